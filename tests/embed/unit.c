/* One behaviour at a time.
 *
 *     unit RING TEST    runs the test of that name; without arguments: lists them
 */
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "os.h"
#include "queue.h"
#include "session.h"

enum { WIDTH = 32, HEIGHT = 4 };
#define PERIOD INT64_C(62500000) /* of 16 frames a second, which make_ring has */

static const char* name;

static void publish(cf_writer* writer, int64_t pts) { publish_id(writer, HEIGHT, &(cf_publish_info){pts, 0, 0, 0, 0}); }

static uint64_t id_of(cf_session* session, uint32_t policy, int64_t time) {
    cf_acquire_info info = CF_ACQUIRE_INFO_INIT;
    cf_frame frame = CF_FRAME_INIT;
    info.policy = policy;
    info.display_time_ns = time;
    if (cf_frame_acquire(session, &info, &frame) != CF_SUCCESS) return 0;
    CHECK(torn_words(&frame) == 0);
    CHECK(cf_frame_release(session, frame.id) == CF_SUCCESS);
    return frame.id;
}

static cf_stats stats_of(cf_session* session) {
    cf_stats stats = CF_STATS_INIT;
    CHECK(cf_stats_get(session, &stats) == CF_SUCCESS);
    return stats;
}

static cf_session_state state_of(cf_session* session) {
    cf_session_state state = CF_SESSION_STATE_INIT;
    CHECK(cf_session_poll_state(session, &state) == CF_SUCCESS);
    return state;
}

static cf_result push_kind(cf_session* session, uint32_t kind, uint64_t* id) {
    cf_event event = CF_EVENT_INIT;
    event.kind = kind;
    return cf_session_push(session, &event, id);
}

/* Run `child` in a process of its own, which is dead when this returns; it ends with _exit, so no clean-up runs. */
static void in_dead_process(void (*child)(void)) {
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        child();
        kill(getpid(), SIGKILL);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
}

/* Frames ----------------------------------------------------------------------------------------------------------- */

static void policies(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 2, 8);
    cf_session *latest = open_session(name, 0), *next = open_session(name, 0);
    const int64_t start = cf_now_ns() + 1000000000;
    CHECK(id_of(latest, CF_POLICY_LATEST, 0) == 0 && id_of(next, CF_POLICY_NEXT, 0) == 0);
    for (int i = 1; i <= 3; ++i) publish(writer, start + i * PERIOD);
    CHECK(id_of(latest, CF_POLICY_LATEST, 0) == 3 && id_of(latest, CF_POLICY_LATEST, 0) == 3);
    for (uint64_t i = 1; i <= 3; ++i) CHECK(id_of(next, CF_POLICY_NEXT, 0) == i);
    CHECK(id_of(next, CF_POLICY_NEXT, 0) == 0);
    for (int i = 4; i <= 30; ++i) publish(writer, start + i * PERIOD);
    CHECK(id_of(next, CF_POLICY_NEXT, 0) == 23); /* eight slots: 23..30 */
    CHECK(id_of(latest, CF_POLICY_LATEST, 0) == 30);
    const cf_stats seen = stats_of(latest), all = stats_of(next);
    CHECK(seen.frames_new == 2 && seen.frames_repeated == 1 && seen.frames_skipped == 26 && seen.not_ready == 1);
    CHECK(all.frames_new == 4 && all.frames_repeated == 0 && all.frames_skipped == 19 && all.not_ready == 2);
    CHECK(all.acquires == 6 && all.acquire_total_ns >= all.acquire_longest_ns && all.generations == 1);
    cf_session_close(latest);
    cf_session_close(next);
    cf_writer_close(writer);
}

static void nearest_frame(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 1, 12);
    cf_session* session = open_session(name, 0);
    const int64_t start = cf_now_ns() + 1000000000;
    for (int i = 1; i <= 10; ++i) publish(writer, start + i * PERIOD);
    CHECK(id_of(session, CF_POLICY_NEAREST, start) == 1);
    CHECK(id_of(session, CF_POLICY_NEAREST, start + 4 * PERIOD + PERIOD / 2 - 1) == 4);
    CHECK(id_of(session, CF_POLICY_NEAREST, start + 4 * PERIOD + PERIOD / 2) == 5); /* equally near: the later */
    CHECK(id_of(session, CF_POLICY_NEAREST, start) == 5);                           /* never back */
    CHECK(id_of(session, CF_POLICY_NEAREST, start + 100 * PERIOD) == 10);
    CHECK(id_of(session, CF_POLICY_NEAREST, INT64_MAX) == 10 && id_of(session, CF_POLICY_NEAREST, INT64_MIN) == 10);
    CHECK(stats_of(session).frames_late == 1); /* 10, long after its time; repeats are not counted */
    cf_session_close(session);
    cf_writer_close(writer);
}

static void description(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 1, 4);
    cf_session* session = open_session(name, 0);
    cf_frame frame;
    publish_id(writer, HEIGHT, &(cf_publish_info){cf_now_ns() + 10000000000, 7, 5, 6, CF_FRAME_DISCONTINUITY});
    CHECK(acquire(session, CF_POLICY_LATEST, 0, &frame) == CF_SUCCESS);
    CHECK(frame.chunk_index == 7 && frame.last_event_id == 5 && frame.applied_at_chunk == 6);
    CHECK(frame.flags == CF_FRAME_DISCONTINUITY && frame.ready_ns <= cf_now_ns() && frame.pts_ns > frame.ready_ns);
    CHECK(frame.width == WIDTH && frame.height == HEIGHT && frame.plane_count == 1 && frame.planes[1].data == NULL);
    CHECK(frame.generation == cf_writer_generation(writer));
    CHECK(cf_frame_release(session, frame.id) == CF_SUCCESS);
    publish_id(writer, HEIGHT, &(cf_publish_info){1, 0, 0, 0, 0}); /* long ago */
    CHECK(acquire(session, CF_POLICY_LATEST, 0, &frame) == CF_SUCCESS && frame.flags == CF_FRAME_LATE);
    CHECK(cf_frame_release(session, frame.id) == CF_SUCCESS);
    cf_session_close(session);
    cf_writer_close(writer);
}

static void held_frame_stays(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 2, 4);
    cf_session *a = open_session(name, 0), *b = open_session(name, 0);
    cf_frame first, other;
    publish(writer, 0);
    CHECK(acquire(a, CF_POLICY_LATEST, 0, &first) == CF_SUCCESS);
    publish(writer, 0);
    CHECK(acquire(b, CF_POLICY_LATEST, 0, &other) == CF_SUCCESS && other.id == 2);
    for (int i = 0; i < 100; ++i) publish(writer, 0); /* both readers hold one, and the writer never waits */
    CHECK(torn_words(&first) == 0 && torn_words(&other) == 0);
    CHECK(acquire(a, CF_POLICY_LATEST, 0, &first) == CF_ERROR_FRAME_HELD);
    CHECK(cf_frame_release(a, 99) == CF_ERROR_NOT_HELD && cf_frame_release(a, 1) == CF_SUCCESS);
    CHECK(cf_frame_release(a, 1) == CF_ERROR_NOT_HELD);
    cf_session_close(b); /* releases by itself */
    cf_session_close(a);
    cf_writer_close(writer);
}

static void late_reader_loses_its_lease(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 1, 3);
    cf_session* session = open_session(name, 1000000);
    cf_frame frame;
    cf_writer_stats stats;
    publish(writer, 0);
    CHECK(acquire(session, CF_POLICY_LATEST, 0, &frame) == CF_SUCCESS);
    usleep(2000);
    publish(writer, 0);
    publish(writer, 0);
    CHECK(torn_words(&frame) == 0); /* late, but nobody wanted the slot */
    publish(writer, 0);
    cf_writer_stats_get(writer, &stats);
    CHECK(stats.revoked == 1);
    CHECK(cf_frame_release(session, frame.id) == CF_ERROR_LEASE_LOST && stats_of(session).leases_lost == 1);
    CHECK(id_of(session, CF_POLICY_LATEST, 0) == 4); /* and goes on */
    cf_session_close(session);
    cf_writer_close(writer);
}

static void hold_and_die(void) {
    cf_frame frame;
    CHECK(acquire(open_session(name, CF_LONGEST_LEASE_NS), CF_POLICY_LATEST, 0, &frame) == CF_SUCCESS);
}

static void dead_reader_blocks_nobody(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 1, 3);
    cf_writer_stats stats;
    publish(writer, 0);
    in_dead_process(hold_and_die); /* its lease would last for a minute */
    for (int i = 0; i < 6; ++i) publish(writer, 0);
    cf_writer_stats_get(writer, &stats);
    CHECK(stats.revoked == 1 && stats.refused == 0 && stats.readers == 1);
    cf_session* session = open_session(name, 0); /* the only lease, taken over */
    CHECK(id_of(session, CF_POLICY_LATEST, 0) == 7);
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* second = NULL;
    info.name = name;
    CHECK(cf_session_open(&info, &second) == CF_ERROR_TOO_MANY_READERS && second == NULL);
    cf_session_close(session);
    CHECK(cf_session_open(&info, &second) == CF_SUCCESS);
    cf_session_close(second);
    cf_writer_close(writer);
}

static void waiting(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 1, 4);
    cf_session* session = open_session(name, 0);
    cf_frame frame;
    int64_t start = cf_now_ns();
    CHECK(acquire(session, CF_POLICY_LATEST, 20000000, &frame) == CF_NOT_READY && cf_now_ns() - start >= 20000000);
    publish(writer, 0);
    CHECK(acquire(session, CF_POLICY_LATEST, 10000000000, &frame) == CF_SUCCESS && !(frame.flags & CF_FRAME_REPEATED));
    CHECK(cf_frame_release(session, 1) == CF_SUCCESS);
    start = cf_now_ns();
    CHECK(acquire(session, CF_POLICY_LATEST, 20000000, &frame) == CF_SUCCESS && frame.flags & CF_FRAME_REPEATED);
    CHECK(cf_now_ns() - start >= 20000000 && cf_frame_release(session, 1) == CF_SUCCESS);
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) { /* a writer may be used by a child that the parent leaves it to */
        usleep(30000);
        publish(writer, 0);
        _exit(0);
    }
    CHECK(acquire(session, CF_POLICY_NEXT, 10000000000, &frame) == CF_SUCCESS && frame.id == 2);
    CHECK(cf_frame_release(session, 2) == CF_SUCCESS && waitpid(pid, NULL, 0) == pid);
    CHECK(stats_of(session).acquire_longest_ns < 20000000); /* waiting is left out */
    cf_session_close(session);
    cf_writer_close(writer);
}

/* Events ----------------------------------------------------------------------------------------------------------- */

static void events(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 1, 4);
    cf_session* session = open_session(name, 0);
    cf_writer_event taken;
    cf_event event = CF_EVENT_INIT;
    uint64_t id = 0;
    event.kind = CF_EVENT_PROMPT;
    event.as.prompt = (cf_prompt){"caf\xc3\xa9!", 5};
    CHECK(cf_session_push(session, &event, &id) == CF_SUCCESS && id == 1);
    event.kind = CF_EVENT_ACTION;
    event.as.action = (cf_action){7, -0.5};
    CHECK(cf_session_push(session, &event, &id) == CF_SUCCESS && id == 2);
    event.kind = CF_EVENT_POSE;
    event.as.pose = (cf_pose){{1, 2, 3}, {0, 0, 0, 1}, 99};
    CHECK(cf_session_push(session, &event, NULL) == CF_SUCCESS);
    CHECK(push_kind(session, CF_EVENT_RESET, &id) == CF_SUCCESS && id == 4);
    CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.id == 1 && taken.kind == CF_EVENT_PROMPT);
    CHECK(taken.bytes == 5 && strcmp(taken.text, "caf\xc3\xa9") == 0 && taken.pushed_ns <= cf_now_ns());
    CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.action.code == 7 && taken.action.value == -0.5);
    CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.pose.position[2] == 3 &&
          taken.pose.time_ns == 99);
    CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.kind == CF_EVENT_RESET && taken.id == 4);
    CHECK(cf_writer_take_event(writer, &taken) == CF_NOT_READY);
    cf_session_close(session);
    cf_writer_close(writer);
}

static void refused_events(void) {
    static const char* const texts[] = {"\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82",
                                        "a\xff",    "\x80",         "\xe0\x80\xaf"};
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 1, 4);
    cf_session* session = open_session(name, 0);
    cf_event event = CF_EVENT_INIT;
    char text[CF_PROMPT_BYTES + 1];
    memset(text, 'a', sizeof text);
    event.kind = CF_EVENT_PROMPT;
    event.as.prompt = (cf_prompt){text, CF_PROMPT_BYTES + 1};
    CHECK(cf_session_push(session, &event, NULL) == CF_ERROR_TOO_LONG);
    event.as.prompt.bytes = CF_PROMPT_BYTES;
    CHECK(cf_session_push(session, &event, NULL) == CF_SUCCESS);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; ++i) {
        event.as.prompt = (cf_prompt){texts[i], (uint32_t)strlen(texts[i])};
        CHECK(cf_session_push(session, &event, NULL) == CF_ERROR_INVALID_ARGUMENT);
    }
    event.as.prompt = (cf_prompt){"a\0b", 3};
    CHECK(cf_session_push(session, &event, NULL) == CF_ERROR_INVALID_ARGUMENT);
    event.kind = CF_EVENT_ACTION;
    event.as.action = (cf_action){1, 1e308 * 10};
    CHECK(cf_session_push(session, &event, NULL) == CF_ERROR_INVALID_ARGUMENT);
    CHECK(push_kind(session, 0, NULL) == CF_ERROR_INVALID_ARGUMENT &&
          push_kind(session, 7, NULL) == CF_ERROR_INVALID_ARGUMENT);
    for (int i = 1; i < 64; ++i) CHECK(push_kind(session, CF_EVENT_PAUSE, NULL) == CF_SUCCESS);
    CHECK(push_kind(session, CF_EVENT_PAUSE, NULL) == CF_ERROR_QUEUE_FULL);
    cf_writer_event taken;
    CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.bytes == CF_PROMPT_BYTES);
    CHECK(push_kind(session, CF_EVENT_PAUSE, NULL) == CF_SUCCESS);
    CHECK(stats_of(session).events_pushed == 65 && stats_of(session).events_refused == 1);
    cf_session_close(session);
    cf_writer_close(writer);
}

/* A producer as it stands between claim and commit: what cf_queue_push does first. */
static void claim_a_cell(cf_session* session) {
    const cf_mapped_ring* ring = session->current;
    const uint64_t position = atomic_load(&ring->queue->tail);
    cf_ring_cell* cell = (cf_ring_cell*)(ring->queue + 1) + position % ring->layout.queue_count;
    atomic_store(&cell->state,
                 position << 24 | (uint64_t)cf_lease_epoch(ring->owner) << 16 | (uint64_t)ring->row << 8 | 1);
}

static void claim_and_die(void) { claim_a_cell(open_session(name, 0)); }

static void dead_producer_blocks_nobody(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 2, 4);
    cf_session* session = open_session(name, 0);
    cf_writer_event taken;
    cf_writer_stats stats;
    uint64_t id = 0;
    for (uint64_t lap = 0; lap < 200; ++lap) {
        if (lap % 40 == 0) in_dead_process(claim_and_die);
        CHECK(push_kind(session, CF_EVENT_PAUSE, &id) == CF_SUCCESS);
        CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.id == id);
        CHECK(cf_writer_take_event(writer, &taken) == CF_NOT_READY);
    }
    cf_writer_stats_get(writer, &stats);
    CHECK(stats.dropped == 5 && id == 205);
    cf_session_close(session);
    cf_writer_close(writer);
}

static void sleeping_producer_is_passed_by(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 2, 4);
    cf_session *session = open_session(name, 0), *sleeper = open_session(name, 0);
    cf_writer_event taken;
    cf_writer_stats stats;
    uint64_t id = 0;
    claim_a_cell(sleeper);
    for (uint64_t i = 2; i <= 64; ++i) { /* all other cells */
        CHECK(push_kind(session, CF_EVENT_PAUSE, &id) == CF_SUCCESS && id == i);
        CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.id == i);
    }
    CHECK(push_kind(session, CF_EVENT_PAUSE, &id) == CF_ERROR_QUEUE_FULL); /* its cell is never given to another */
    cf_ring_cell* cell = (cf_ring_cell*)(sleeper->current->queue + 1);
    cell->kind = CF_EVENT_RESUME;
    atomic_store(&cell->state, 2); /* it wakes up and commits */
    CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.id == 1 && taken.kind == CF_EVENT_RESUME);
    for (uint64_t i = 65; i < 300; ++i) {
        CHECK(push_kind(session, CF_EVENT_PAUSE, &id) == CF_SUCCESS && id == i);
        CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.id == i);
    }
    cf_writer_stats_get(writer, &stats);
    CHECK(stats.dropped == 0);
    cf_session_close(session);
    cf_session_close(sleeper);
    cf_writer_close(writer);
}

/* Writers that come and go ----------------------------------------------------------------------------------------- */

static void write_and_die(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 2, 4);
    CHECK(cf_writer_set_state(writer, CF_STATE_RUNNING) == CF_SUCCESS);
    publish(writer, 0);
}

static void wait_for_generation(cf_session* session, uint64_t generation) {
    for (int i = 0; i < 500 && state_of(session).generation != generation; ++i) usleep(10000);
    CHECK(state_of(session).generation == generation);
}

static void dead_writer_is_followed(void) {
    in_dead_process(write_and_die);
    cf_session* session = open_session(name, 30000000000);
    cf_frame old, frame;
    CHECK(acquire(session, CF_POLICY_LATEST, 0, &old) == CF_SUCCESS && old.id == 1);
    for (int i = 0; i < 500 && state_of(session).writer_alive; ++i) usleep(10000);
    CHECK(state_of(session).state == CF_STATE_ERROR && !state_of(session).writer_alive);
    cf_writer* writer = make_ring(name, 2 * WIDTH, HEIGHT, 2, 4); /* another size */
    CHECK(cf_writer_generation(writer) != old.generation);
    publish(writer, 0);
    wait_for_generation(session, cf_writer_generation(writer));
    CHECK(torn_words(&old) == 0 && cf_frame_release(session, old.id) == CF_SUCCESS); /* held over the change */
    CHECK(acquire(session, CF_POLICY_NEXT, 0, &frame) == CF_SUCCESS && frame.id == 1 && frame.width == 2 * WIDTH);
    CHECK(frame.flags & CF_FRAME_DISCONTINUITY && !(frame.flags & CF_FRAME_REPEATED));
    CHECK(torn_words(&frame) == 0 && cf_frame_release(session, 1) == CF_SUCCESS);
    publish(writer, 0);
    CHECK(acquire(session, CF_POLICY_NEXT, 0, &frame) == CF_SUCCESS && !(frame.flags & CF_FRAME_DISCONTINUITY));
    CHECK(cf_frame_release(session, 2) == CF_SUCCESS && stats_of(session).generations == 2);
    CHECK(push_kind(session, CF_EVENT_RESET, NULL) == CF_SUCCESS);
    cf_writer_event taken;
    CHECK(cf_writer_take_event(writer, &taken) == CF_SUCCESS && taken.id == 1); /* events go to the new writer */
    cf_session_close(session);
    cf_writer_close(writer);
}

static void ended_and_unlinked_rings(void) {
    cf_writer* first = make_ring(name, WIDTH, HEIGHT, 2, 4);
    cf_session* session = open_session(name, 0);
    publish(first, 0);
    CHECK(id_of(session, CF_POLICY_NEXT, 0) == 1);
    cf_writer_close(first);
    CHECK(state_of(session).state == CF_STATE_ENDED && state_of(session).writer_alive == 0);
    CHECK(id_of(session, CF_POLICY_LATEST, 0) == 1); /* what was shown stays */
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* none = NULL;
    info.name = name;
    CHECK(cf_session_open(&info, &none) == CF_ERROR_NOT_FOUND);
    cf_writer* second = make_ring(name, WIDTH, HEIGHT, 2, 4);
    publish(second, 0);
    wait_for_generation(session, cf_writer_generation(second));
    char path[128];
    snprintf(path, sizeof path, "/cfengine.%s", name);
    CHECK(shm_unlink(path) == 0); /* somebody tidied up */
    cf_writer* third = make_ring(name, WIDTH, HEIGHT, 2, 4);
    cf_writer_close(second); /* does not take the name from the third */
    publish(third, 0);
    wait_for_generation(session, cf_writer_generation(third));
    CHECK(id_of(session, CF_POLICY_NEXT, 0) == 1 && stats_of(session).generations == 3);
    cf_session_close(session);
    cf_writer_close(third);
    CHECK(cf_session_open(&info, &none) == CF_ERROR_NOT_FOUND);
}

static void one_writer_a_name(void) {
    const cf_writer_info info = {name, CF_FORMAT_RGBA8, WIDTH,          HEIGHT, 16, 1, 1, 4,
                                 64,   1000000000,      CF_MEMORY_HOST, NULL};
    cf_writer *writer = make_ring(name, WIDTH, HEIGHT, 1, 4), *second = NULL;
    CHECK(cf_writer_create(&info, &second) == CF_ERROR_BUSY && second == NULL &&
          cf_writer_unlink(name) == CF_ERROR_BUSY);
    cf_writer_close(writer);
    CHECK(cf_writer_unlink(name) == CF_ERROR_NOT_FOUND);
    in_dead_process(write_and_die);
    CHECK(cf_writer_unlink(name) == CF_SUCCESS && cf_writer_unlink(name) == CF_ERROR_NOT_FOUND);
}

static void states(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 3, 9); /* stalls after a second */
    cf_session* session = open_session(name, 0);
    CHECK(state_of(session).state == CF_STATE_LOADING && state_of(session).newest_id == 0);
    for (uint32_t state = CF_STATE_READY; state <= CF_STATE_PAUSED; ++state) {
        CHECK(cf_writer_set_state(writer, state) == CF_SUCCESS && state_of(session).state == state);
    }
    CHECK(cf_writer_set_state(writer, 0) == CF_ERROR_INVALID_ARGUMENT &&
          cf_writer_set_state(writer, 8) == CF_ERROR_INVALID_ARGUMENT);
    cf_writer_set_state(writer, CF_STATE_RUNNING);
    publish(writer, 0);
    usleep(1100000);
    const cf_session_state state = state_of(session);
    CHECK(state.state == CF_STATE_STALLED && state.writer_alive == 1 && state.newest_id == 1);
    CHECK(state.slots == 9 && state.readers == 3 && state.fps_numerator == 16 && state.fps_denominator == 1);
    cf_writer_beat(writer);
    CHECK(state_of(session).state == CF_STATE_RUNNING);
    cf_session_close(session);
    cf_writer_close(writer);
}

/* Device memory ---------------------------------------------------------------------------------------------------- */

static cf_writer_info device_info(uint32_t format) {
    return (cf_writer_info){
        name, format, WIDTH, HEIGHT, 16, 1, 1, 4, 64, 1000000000, CF_MEMORY_OPAQUE_FD, "/nowhere/cfengine-test"};
}

static cf_result open_for(uint32_t flags, cf_session** session) {
    cf_session_info info = CF_SESSION_INFO_INIT;
    info.name = name;
    info.flags = flags;
    return cf_session_open(&info, session);
}

static void device_rings(void) {
    const cf_writer_info info = device_info(CF_FORMAT_NV12);
    cf_writer* writer = NULL;
    cf_session* session = NULL;
    cf_device_memory memory = CF_DEVICE_MEMORY_INIT;
    cf_writable slot;
    cf_frame frame;
    uint64_t stride = 0;
    CHECK(cf_writer_frame_stride(&info, &stride) == CF_SUCCESS && stride == 4096);
    CHECK(cf_writer_create(&info, &writer) == CF_SUCCESS);
    CHECK(open_for(0, &session) == CF_ERROR_MEMORY_KIND && session == NULL);
    CHECK(strstr(cf_last_error(), "CF_SESSION_DEVICE_MEMORY") != NULL);
    CHECK(open_for(4, &session) == CF_ERROR_INVALID_ARGUMENT);
    CHECK(open_for(CF_SESSION_DEVICE_MEMORY, &session) == CF_SUCCESS && state_of(session).memory == info.memory);
    CHECK(cf_writer_publish(writer, (cf_pixels){(const uint8_t*)"", 0, 3, WIDTH, HEIGHT}, &(cf_publish_info){0},
                            NULL) == CF_ERROR_INVALID_ARGUMENT);
    for (uint64_t id = 1; id <= 9; ++id) {
        CHECK(cf_writer_begin(writer, &slot) == CF_SUCCESS && slot.id == id);
        CHECK(slot.planes[0] == NULL && slot.planes[1] == NULL && slot.offsets[0] % stride == 0);
        CHECK(slot.offsets[0] < 4 * stride && slot.offsets[1] == slot.offsets[0] + 64 * HEIGHT);
        cf_writer_cancel(writer); /* the copy has failed: nobody sees it, and the slot is free */
        CHECK(acquire(session, CF_POLICY_NEXT, 0, &frame) == CF_NOT_READY);
        CHECK(cf_writer_begin(writer, &slot) == CF_SUCCESS && slot.id == id);
        CHECK(cf_writer_commit(writer, &(cf_publish_info){0}) == CF_SUCCESS);
        CHECK(acquire(session, CF_POLICY_NEXT, 0, &frame) == CF_SUCCESS && frame.memory == CF_MEMORY_OPAQUE_FD);
        CHECK(frame.planes[0].data == NULL && frame.planes[1].data == NULL);
        CHECK(frame.planes[0].size == 64 * HEIGHT && frame.planes[1].size == 64 * HEIGHT / 2);
        CHECK(memcmp(frame.offsets, slot.offsets, sizeof slot.offsets) == 0);
        CHECK(cf_session_device_memory(session, &memory) == CF_ERROR_NOT_FOUND && memory.fd == -1);
        CHECK(cf_frame_release(session, id) == CF_SUCCESS);
    }
    CHECK(cf_session_device_memory(NULL, &memory) == CF_ERROR_INVALID_ARGUMENT);
    CHECK(cf_session_device_memory(session, NULL) == CF_ERROR_INVALID_ARGUMENT);
    cf_session_close(session);
    cf_writer_close(writer);
    writer = make_ring(name, WIDTH, HEIGHT, 1, 4);
    CHECK(open_for(CF_SESSION_DEVICE_MEMORY, &session) == CF_SUCCESS); /* takes host memory too */
    CHECK(cf_session_device_memory(session, &memory) == CF_ERROR_MEMORY_KIND);
    publish(writer, 0);
    CHECK(acquire(session, CF_POLICY_LATEST, 0, &frame) == CF_SUCCESS && torn_words(&frame) == 0);
    CHECK(frame.offsets[0] == 0 && frame.offsets[1] == 0);
    cf_session_close(session);
    cf_writer_close(writer);
}

/* A program that was compiled with the header of 1.0: shorter structures, and nothing behind them is touched. */
static void programs_of_version_one(void) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 2, 4);
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* session = NULL;
    info.name = name;
    info.header.struct_size = CF_SESSION_INFO_LEAST;
    info.flags = info.reserved = UINT32_MAX; /* what lies behind it on the stack */
    CHECK(cf_session_open(&info, &session) == CF_SUCCESS);
    cf_acquire_info when = CF_ACQUIRE_INFO_INIT;
    volatile size_t least = CF_FRAME_LEAST; /* the compiler is not told that this is not a whole one */
    cf_frame* frame = calloc(1, least);     /* AddressSanitizer watches its end */
    frame->header = (cf_header){CF_FRAME_LEAST, CF_STRUCT_FRAME, NULL};
    publish(writer, 0);
    CHECK(cf_frame_acquire(session, &when, frame) == CF_SUCCESS && frame->planes[0].data != NULL);
    CHECK(cf_frame_release(session, 1) == CF_SUCCESS);
    frame->header.struct_size = CF_FRAME_LEAST - 1;
    CHECK(cf_frame_acquire(session, &when, frame) == CF_ERROR_INVALID_ARGUMENT);
    cf_writer_close(writer);
    const cf_writer_info device = device_info(CF_FORMAT_RGBA8);
    cf_session* second = NULL;
    CHECK(cf_writer_create(&device, &writer) == CF_SUCCESS);
    CHECK(cf_session_open(&info, &second) == CF_ERROR_MEMORY_KIND); /* its flags are not looked at */
    usleep(110000);                                                 /* it looks after 0.1 s without a heartbeat */
    frame->header.struct_size = CF_FRAME_LEAST;
    CHECK(state_of(session).state == CF_STATE_ENDED && state_of(session).memory == CF_MEMORY_HOST);
    CHECK(cf_frame_acquire(session, &when, frame) == CF_SUCCESS && frame->planes[0].data != NULL); /* as before */
    free(frame);
    cf_session_close(session);
    cf_writer_close(writer);
}

/* What callers get wrong ---------------------------------------------------------------------------------------------
 */

static void wrong_arguments(void) {
    static const char* const names[] = {
        NULL, "", "a/b", "..", ".hidden", "a b", "01234567890123456789012345678901234567890123456789012345678901234"};
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* session = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
        info.name = names[i];
        CHECK(cf_session_open(&info, &session) == CF_ERROR_INVALID_ARGUMENT && session == NULL);
    }
    info.name = name;
    CHECK(cf_session_open(&info, &session) == CF_ERROR_NOT_FOUND && strstr(cf_last_error(), name) != NULL);
    info.lease_ns = -1;
    CHECK(cf_session_open(&info, &session) == CF_ERROR_INVALID_ARGUMENT);
    info.lease_ns = 0;
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 1, 4);
    info.header.struct_size = 8;
    CHECK(cf_session_open(&info, &session) == CF_ERROR_INVALID_ARGUMENT);
    info.header.struct_size = sizeof info + 64; /* of a later minor version */
    info.header.next = &info;
    CHECK(cf_session_open(&info, &session) == CF_ERROR_INVALID_ARGUMENT);
    info.header.next = NULL;
    CHECK(cf_session_open(&info, &session) == CF_SUCCESS);
    cf_acquire_info when = CF_ACQUIRE_INFO_INIT;
    cf_frame frame = CF_FRAME_INIT;
    CHECK(cf_frame_acquire(session, NULL, &frame) == CF_ERROR_INVALID_ARGUMENT);
    CHECK(cf_frame_acquire(session, &when, NULL) == CF_ERROR_INVALID_ARGUMENT);
    CHECK(cf_frame_acquire(NULL, &when, &frame) == CF_ERROR_INVALID_ARGUMENT);
    when.timeout_ns = -1;
    CHECK(cf_frame_acquire(session, &when, &frame) == CF_ERROR_INVALID_ARGUMENT);
    when.timeout_ns = 0;
    when.policy = 3;
    CHECK(cf_frame_acquire(session, &when, &frame) == CF_ERROR_INVALID_ARGUMENT);
    cf_version version = CF_VERSION_INIT;
    CHECK(cf_get_version(CF_VERSION_MAJOR, &version) == CF_SUCCESS && version.major == 1 && version.ring_major == 1);
    CHECK(cf_get_version(2, &version) == CF_ERROR_VERSION && strstr(cf_last_error(), "version 2") != NULL);
    for (cf_result result = CF_ERROR_UNSUPPORTED; result <= CF_NOT_READY; ++result)
        CHECK(strcmp(cf_result_name(result), "CF_UNKNOWN") != 0);
    CHECK(strcmp(cf_result_name(99), "CF_UNKNOWN") == 0);
    CHECK(cf_session_close(NULL) == CF_SUCCESS && cf_session_close(session) == CF_SUCCESS);
    cf_writer_close(writer);
}

static void wrong_rings(void) {
    const cf_writer_info good = {name, CF_FORMAT_NV12, 64, 48, 16, 1, 2, 4, 64, 1000000000, CF_MEMORY_HOST, NULL};
    cf_writer_info wrong[13];
    cf_writer* writer = NULL;
    for (int i = 0; i < 13; ++i) wrong[i] = good;
    wrong[0].format = 3;
    wrong[1].width = 0;
    wrong[2].height = 16385;
    wrong[3].width = 63; /* odd in NV12 */
    wrong[4].readers = 17;
    wrong[5].slots = 3;
    wrong[6].events = 48;
    wrong[7].fps_denominator = 0;
    wrong[8].stall_ns = 0;
    wrong[9].memory = 0;
    wrong[10].memory = CF_MEMORY_OPAQUE_FD; /* without a socket */
    wrong[11].memory = CF_MEMORY_OPAQUE_FD;
    wrong[11].handle_socket = "in/this/folder";
    char path[109] = "/";
    wrong[12].memory = CF_MEMORY_CUDA_IPC;
    wrong[12].handle_socket = memset(path + 1, 'a', 107) - 1; /* 108 bytes, and no room for the zero */
    for (int i = 0; i < 13; ++i)
        CHECK(cf_writer_create(&wrong[i], &writer) == CF_ERROR_INVALID_ARGUMENT &&
              strstr(cf_last_error(), name) != NULL);
    struct statvfs shared;
    wrong[0] = good;
    wrong[0].width = wrong[0].height = 16384;
    wrong[0].slots = 250; /* 94 GiB */
    if (statvfs("/dev/shm", &shared) == 0 && (uint64_t)shared.f_blocks * shared.f_frsize < UINT64_C(90) << 30)
        CHECK(cf_writer_create(&wrong[0], &writer) == CF_ERROR_OUT_OF_MEMORY && writer == NULL);
    CHECK(cf_writer_create(&good, &writer) == CF_SUCCESS);
    CHECK(cf_writer_commit(writer, &(cf_publish_info){0}) == CF_ERROR_INVALID_ARGUMENT);
    cf_writable slot;
    CHECK(cf_writer_begin(writer, &slot) == CF_SUCCESS && cf_writer_begin(writer, &slot) == CF_ERROR_BUSY);
    cf_writer_close(writer);
}

typedef struct test {
    const char* name;
    void (*run)(void);
} test;

#define TEST(function) {#function, function}
static const test tests[] = {
    TEST(policies),
    TEST(nearest_frame),
    TEST(description),
    TEST(held_frame_stays),
    TEST(late_reader_loses_its_lease),
    TEST(dead_reader_blocks_nobody),
    TEST(waiting),
    TEST(events),
    TEST(refused_events),
    TEST(dead_producer_blocks_nobody),
    TEST(sleeping_producer_is_passed_by),
    TEST(dead_writer_is_followed),
    TEST(ended_and_unlinked_rings),
    TEST(one_writer_a_name),
    TEST(states),
    TEST(device_rings),
    TEST(programs_of_version_one),
    TEST(wrong_arguments),
    TEST(wrong_rings),
};

int main(int argc, char** argv) {
    for (size_t i = 0; i < sizeof tests / sizeof *tests; ++i) {
        if (argc < 3) {
            printf("%s\n", tests[i].name);
        } else if (strcmp(argv[2], tests[i].name) == 0) {
            name = argv[1];
            tests[i].run();
            return 0;
        }
    }
    return argc < 3 ? 0 : 2;
}
