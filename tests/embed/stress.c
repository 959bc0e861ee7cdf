/* Readers and a writer at full speed in one process: no frame is torn, none goes back, no event is lost.
 *
 *     stress NAME CYCLES    acquire/release cycles of both readers together
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "check.h"

enum { WIDTH = 32, HEIGHT = 4, READERS = 2, SLOTS = READERS + 2 };

static const char* name;
static uint64_t cycles_each;
static atomic_int reading = READERS;
static atomic_ullong pushed[READERS], taken[READERS];
static atomic_ullong cycles; /* of all readers, roughly: the writer makes a few frames a cycle and then gives way */

static void push(cf_session* session, uint32_t reader, uint64_t number) {
    cf_event event = CF_EVENT_INIT;
    event.kind = CF_EVENT_ACTION;
    event.as.action = (cf_action){reader, (double)number};
    uint64_t id = 0;
    const cf_result result = cf_session_push(session, &event, &id);
    CHECK(result == CF_ERROR_QUEUE_FULL || (result == CF_SUCCESS && id > 0));
    if (result == CF_SUCCESS) atomic_fetch_add(&pushed[reader], 1);
}

/* A second thread of a session does what any thread may, beside the consumer. */
typedef struct companion {
    cf_session* session;
    uint32_t reader;
    atomic_int stop;
} companion;

static void* accompany(void* argument) {
    companion* self = argument;
    for (uint64_t i = 1; !atomic_load(&self->stop); ++i) {
        cf_session_state state = CF_SESSION_STATE_INIT;
        cf_stats stats = CF_STATS_INIT;
        CHECK(cf_session_poll_state(self->session, &state) == CF_SUCCESS && state.writer_alive == 1);
        CHECK(cf_stats_get(self->session, &stats) == CF_SUCCESS);
        push(self->session, self->reader, i);
        nanosleep(&(struct timespec){0, 100000}, NULL);
    }
    return NULL;
}

static void* read_frames(void* argument) {
    const uint32_t reader = (uint32_t)(uintptr_t)argument;
    companion beside = {open_session(name, 30000000000), reader, 0};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, accompany, &beside) == 0);
    uint64_t last = 0, torn = 0;
    for (uint64_t cycle = 0; cycle < cycles_each;) {
        cf_frame frame;
        /* the second reader wants every frame, and waits for one now and then; where there is none it reads the same
         * again */
        uint32_t policy = reader == 1 && cycle % 2 ? CF_POLICY_NEXT : CF_POLICY_LATEST;
        cf_result result = acquire(beside.session, policy, cycle % 1024 == 1023 ? 1000000 : 0, &frame);
        if (result == CF_NOT_READY) result = acquire(beside.session, policy = CF_POLICY_LATEST, 0, &frame);
        if (result == CF_NOT_READY) continue; /* before the first frame */
        CHECK(result == CF_SUCCESS);
        torn += torn_words(&frame);
        CHECK(frame.chunk_index == frame.id / 3 && frame.pts_ns == (int64_t)frame.id * 1000);
        CHECK(policy == CF_POLICY_NEXT ? frame.id > last : frame.id >= last); /* never back */
        CHECK((frame.flags & CF_FRAME_REPEATED) == (frame.id == last));
        last = frame.id;
        CHECK(cf_frame_release(beside.session, frame.id) == CF_SUCCESS);
        if (++cycle % 256 == 0) {
            atomic_fetch_add(&cycles, 256);
            sched_yield(); /* few cores: let the writer go on, or every frame is a repeated one */
        }
    }
    CHECK(torn == 0);
    atomic_store(&beside.stop, 1);
    pthread_join(thread, NULL);
    cf_stats stats = CF_STATS_INIT;
    CHECK(cf_stats_get(beside.session, &stats) == CF_SUCCESS);
    CHECK(stats.leases_lost == 0 && stats.frames_new + stats.frames_repeated == cycles_each);
    printf("reader %u: %" PRIu64 " new, %" PRIu64 " repeated, %" PRIu64 " skipped, longest acquire %" PRId64 " ns\n",
           reader, stats.frames_new, stats.frames_repeated, stats.frames_skipped, stats.acquire_longest_ns);
    cf_session_close(beside.session);
    atomic_fetch_sub(&reading, 1);
    return NULL;
}

/* Events of one thread come in its order and each once. */
static void take_events(cf_writer* writer, double last[READERS], uint64_t* last_id) {
    cf_writer_event event;
    while (cf_writer_take_event(writer, &event) == CF_SUCCESS) {
        const uint32_t reader = event.action.code;
        CHECK(event.kind == CF_EVENT_ACTION && reader < READERS);
        CHECK(event.id > *last_id || event.action.value > last[reader]); /* one that slept in its push comes later */
        CHECK(event.action.value > last[reader]);
        if (event.id > *last_id) *last_id = event.id;
        last[reader] = event.action.value;
        atomic_fetch_add(&taken[reader], 1);
    }
}

int main(int argc, char** argv) {
    CHECK(argc == 3);
    name = argv[1];
    cycles_each = strtoull(argv[2], NULL, 10) / READERS;
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, READERS, SLOTS);
    CHECK(cf_writer_set_state(writer, CF_STATE_RUNNING) == CF_SUCCESS);
    pthread_t threads[READERS];
    for (uintptr_t i = 0; i < READERS; ++i) CHECK(pthread_create(&threads[i], NULL, read_frames, (void*)i) == 0);
    double last[READERS] = {0};
    uint64_t frames = 0, last_id = 0;
    while (atomic_load(&reading) > 0) {
        while (frames > 2 * atomic_load(&cycles) + 1000 && atomic_load(&reading) > 0) sched_yield();
        ++frames;
        const cf_publish_info info = {(int64_t)frames * 1000, frames / 3, 0, 0, 0};
        publish_id(writer, HEIGHT, &info);
        take_events(writer, last, &last_id);
    }
    for (int i = 0; i < READERS; ++i) pthread_join(threads[i], NULL);
    take_events(writer, last, &last_id);
    cf_writer_stats stats;
    cf_writer_stats_get(writer, &stats);
    CHECK(stats.published == frames && stats.revoked == 0 && stats.refused == 0 && stats.dropped == 0 &&
          stats.readers == 0);
    for (int i = 0; i < READERS; ++i) CHECK(atomic_load(&pushed[i]) == atomic_load(&taken[i]));
    printf("%" PRIu64 " cycles, %" PRIu64 " frames, %" PRIu64 " events\n", cycles_each * READERS, frames, last_id);
    cf_writer_close(writer);
    return 0;
}
