/* Writers come and go while all threads of a session work: no thread is left in memory that was unmapped.
 *
 *     follow NAME WRITERS
 */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "check.h"

enum { WIDTH = 32, HEIGHT = 4 };

static cf_session* session;
static atomic_int stop;

static void* poll_and_push(void* argument) {
    (void)argument;
    while (!atomic_load(&stop)) {
        cf_session_state state = CF_SESSION_STATE_INIT;
        cf_event event = CF_EVENT_INIT;
        event.kind = CF_EVENT_PAUSE;
        CHECK(cf_session_poll_state(session, &state) == CF_SUCCESS);
        cf_session_push(session, &event, NULL); /* the queue may be full */
    }
    return NULL;
}

static void* consume(void* argument) {
    uint64_t generation = 0, *generations = argument;
    while (!atomic_load(&stop)) {
        cf_frame frame;
        const cf_result result = acquire(session, CF_POLICY_LATEST, 1000000, &frame);
        CHECK(result == CF_SUCCESS || result == CF_NOT_READY);
        if (result != CF_SUCCESS) continue;
        CHECK(torn_words(&frame) == 0);
        *generations += frame.generation != generation;
        generation = frame.generation;
        CHECK(cf_frame_release(session, frame.id) == CF_SUCCESS);
    }
    return NULL;
}

int main(int argc, char** argv) {
    CHECK(argc == 3);
    const uint64_t writers = strtoull(argv[2], NULL, 10);
    uint64_t generations = 0;
    pthread_t threads[4];
    cf_writer* writer = make_ring(argv[1], WIDTH, HEIGHT, 2, 4);
    session = open_session(argv[1], 30000000000);
    CHECK(pthread_create(&threads[0], NULL, consume, &generations) == 0);
    for (int i = 1; i < 4; ++i) CHECK(pthread_create(&threads[i], NULL, poll_and_push, NULL) == 0);
    for (uint64_t i = 0; i < writers; ++i) {
        for (int frame = 0; frame < 20; ++frame) {
            publish_id(writer, HEIGHT, &(cf_publish_info){0, 0, 0, 0, 0});
            nanosleep(&(struct timespec){0, 6000000}, NULL);
        }
        cf_writer_close(writer);
        writer = make_ring(argv[1], WIDTH, HEIGHT, 2, 4);
    }
    atomic_store(&stop, 1);
    for (int i = 0; i < 4; ++i) pthread_join(threads[i], NULL);
    cf_stats stats = CF_STATS_INIT;
    CHECK(cf_stats_get(session, &stats) == CF_SUCCESS);
    printf("%" PRIu64 " generations of %" PRIu64 " seen\n", stats.generations, writers + 1);
    CHECK(stats.generations > writers / 2 && generations > writers / 2);
    cf_session_close(session);
    cf_writer_close(writer);
    return 0;
}
