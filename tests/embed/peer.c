/* A process to be killed: a writer or a reader that checks every word of every frame.
 *
 *     peer write NAME           makes the ring, says "ready", publishes until it is killed
 *     peer read NAME SECONDS    reads for so long, through every restart of the writer; says what it saw
 *     peer hold NAME            acquires, says "held", sleeps until it is killed
 */
#include <time.h>

#include "check.h"

enum { WIDTH = 64, HEIGHT = 16 };

static void say(const char* text) {
    puts(text);
    fflush(stdout);
}

static int write_for_ever(const char* name) {
    cf_writer* writer = make_ring(name, WIDTH, HEIGHT, 4, 8);
    CHECK(cf_writer_set_state(writer, CF_STATE_RUNNING) == CF_SUCCESS);
    say("ready");
    for (uint64_t i = 1;; ++i) {
        publish_id(writer, HEIGHT, &(cf_publish_info){0, i, 0, 0, 0});
        if (i % 32 == 0) nanosleep(&(struct timespec){0, 1000}, NULL);
    }
}

static int read_for(const char* name, double seconds) {
    cf_session* session = open_session(name, 0);
    uint64_t generation = 0, last = 0, jumps = 0, frames = 0, lost = 0;
    for (const int64_t until = cf_now_ns() + (int64_t)(seconds * 1e9); cf_now_ns() < until;) {
        cf_frame frame;
        const cf_result result = acquire(session, CF_POLICY_LATEST, 10000000, &frame);
        if (result == CF_NOT_READY) continue; /* a new writer without a frame yet */
        CHECK(result == CF_SUCCESS);
        const uint64_t torn = torn_words(&frame);
        CHECK(frame.generation == generation ? frame.id >= last
                                             : generation == 0 || frame.flags & CF_FRAME_DISCONTINUITY);
        CHECK(frame.chunk_index == frame.id);
        jumps += frame.generation != generation;
        frames += frame.id != last;
        generation = frame.generation;
        last = frame.id;
        const cf_result released = cf_frame_release(session, frame.id);
        CHECK(released == CF_ERROR_LEASE_LOST || (released == CF_SUCCESS && torn == 0));
        lost += released == CF_ERROR_LEASE_LOST;
    }
    cf_session_state state = CF_SESSION_STATE_INIT;
    CHECK(cf_session_poll_state(session, &state) == CF_SUCCESS);
    printf("writers %" PRIu64 " frames %" PRIu64 " lost %" PRIu64 " alive %u\n", jumps, frames, lost,
           state.writer_alive);
    cf_session_close(session);
    return 0;
}

static int hold(const char* name) {
    cf_frame frame;
    CHECK(acquire(open_session(name, 60000000000), CF_POLICY_LATEST, 10000000000, &frame) == CF_SUCCESS);
    CHECK(torn_words(&frame) == 0);
    say("held");
    for (;;) nanosleep(&(struct timespec){1, 0}, NULL);
}

int main(int argc, char** argv) {
    CHECK(argc >= 3);
    if (strcmp(argv[1], "write") == 0) return write_for_ever(argv[2]);
    if (strcmp(argv[1], "hold") == 0) return hold(argv[2]);
    CHECK(argc == 4);
    return read_for(argv[2], strtod(argv[3], NULL));
}
