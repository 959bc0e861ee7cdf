/* A ring that somebody has damaged is refused or read harmlessly: never a crash, under AddressSanitizer.
 *
 *     fuzz NAME SEED CASES SECONDS    CASES objects damaged before they are opened, then SECONDS of damage while
 *                                     a reader reads and a writer writes
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "ring.h"

static uint64_t seed;

static uint64_t roll(void) { /* xorshift */
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static uint64_t below(uint64_t limit) { return roll() % limit; }

/* A value that is likely to slip past a check. */
static uint64_t hostile(uint64_t now) {
    static const uint64_t values[] = {0,
                                      1,
                                      2,
                                      15,
                                      16,
                                      17,
                                      63,
                                      64,
                                      127,
                                      128,
                                      249,
                                      250,
                                      255,
                                      256,
                                      4095,
                                      4096,
                                      65535,
                                      65536,
                                      INT32_MAX,
                                      UINT32_MAX,
                                      (uint64_t)UINT32_MAX + 1,
                                      INT64_MAX,
                                      (uint64_t)INT64_MAX + 1,
                                      UINT64_MAX - 65535,
                                      UINT64_MAX - 63,
                                      UINT64_MAX};
    switch (below(6)) {
        case 0:
            return roll();
        case 1:
            return now + 1 + below(64);
        case 2:
            return now - 1 - below(64);
        case 3:
            return now ^ (UINT64_C(1) << below(64));
        case 4:
            return now << below(32);
        default:
            return values[below(sizeof values / sizeof *values)];
    }
}

static char path[128];
static uint8_t* good; /* a ring with frames, readers and events */
static size_t good_size;
static uint64_t opened, refused;

static void keep_good_image(const char* name) {
    cf_writer* writer = make_ring(name, 16, 4, 3, 8);
    for (int i = 0; i < 12; ++i) publish_id(writer, 4, &(cf_publish_info){cf_now_ns() + i * 1000, 0, 0, 0, 0});
    cf_session* session = open_session(name, 0);
    cf_event event = CF_EVENT_INIT;
    event.kind = CF_EVENT_PROMPT;
    event.as.prompt = (cf_prompt){"a meadow", 8};
    CHECK(cf_session_push(session, &event, NULL) == CF_SUCCESS);
    const int file = shm_open(path, O_RDONLY, 0);
    struct stat status;
    CHECK(file >= 0 && fstat(file, &status) == 0);
    good_size = (size_t)status.st_size;
    good = malloc(good_size);
    CHECK(good != NULL && read(file, good, good_size) == (ssize_t)good_size);
    close(file);
    cf_session_close(session);
    cf_writer_close(writer);
}

static void put(const uint8_t* image, size_t size) {
    shm_unlink(path);
    const int file = shm_open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    CHECK(file >= 0);
    CHECK(write(file, image, size) == (ssize_t)size);
    close(file);
}

/* Everything that a program would do with a session; bytes at both ends of each plane are read. */
static void use(cf_session* session, uint32_t rounds) {
    volatile uint8_t sink = 0;
    for (uint32_t i = 0; i < rounds; ++i) {
        cf_frame frame;
        cf_session_state state = CF_SESSION_STATE_INIT;
        cf_stats stats = CF_STATS_INIT;
        if (acquire(session, i % 3, i % 5 ? 0 : 1000, &frame) == CF_SUCCESS) {
            for (uint32_t p = 0; p < frame.plane_count; ++p) {
                const uint8_t* data = frame.planes[p].data;
                sink ^= data[0] ^ data[frame.planes[p].size - 1];
            }
            const cf_result result = cf_frame_release(session, frame.id);
            CHECK(result == CF_SUCCESS || result == CF_ERROR_LEASE_LOST);
        }
        cf_event event = CF_EVENT_INIT;
        event.kind = i % 2 ? CF_EVENT_PAUSE : CF_EVENT_PROMPT;
        if (i % 2 == 0) event.as.prompt = (cf_prompt){"hills", 5};
        cf_session_push(session, &event, NULL);
        CHECK(cf_session_poll_state(session, &state) == CF_SUCCESS);
        CHECK(state.state >= CF_STATE_LOADING && state.state <= CF_STATE_ENDED);
        CHECK(cf_stats_get(session, &stats) == CF_SUCCESS);
    }
    (void)sink;
}

static cf_result open_damaged(const char* name) {
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* session = NULL;
    info.name = name;
    const cf_result result = cf_session_open(&info, &session);
    CHECK((result == CF_SUCCESS) == (session != NULL));
    CHECK(result == CF_SUCCESS || cf_last_error()[0] != 0);
    if (result == CF_SUCCESS) use(session, 6);
    cf_session_close(session);
    ++*(result == CF_SUCCESS ? &opened : &refused);
    return result;
}

/* Damage `count` aligned words somewhere in [from, to). */
static void damage(uint8_t* image, size_t from, size_t to, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) {
        const size_t wide = below(2) ? 8 : 4;
        uint8_t* at = image + from + below((to - from) / wide) * wide;
        uint64_t value = 0;
        memcpy(&value, at, wide);
        value = hostile(value);
        memcpy(at, &value, wide);
    }
}

static void one_case(const char* name, uint8_t* image) {
    const size_t layout_end = 8 + sizeof(cf_ring_layout), clients = good_size - 65536 * (good_size / 65536 / 2);
    memcpy(image, good, good_size);
    size_t size = good_size;
    cf_result result;
    switch (below(7)) {
        case 0: /* cut */
            size = below(good_size);
            put(image, size);
            CHECK(open_damaged(name) < 0);
            return;
        case 1: /* another version, another magic */
            if (below(2)) {
                memcpy(image + 8, &(uint32_t){(uint32_t)roll() | 2}, 4);
                put(image, size);
                CHECK(open_damaged(name) == CF_ERROR_VERSION);
            } else {
                memcpy(image + below(8), &(uint8_t){0xaa}, 1);
                put(image, size);
                CHECK(open_damaged(name) == CF_ERROR_BAD_RING);
            }
            return;
        case 2:
            damage(image, 16, layout_end, 1);
            break; /* hostile sizes */
        case 3:
            damage(image, 16, layout_end, 1 + below(6));
            break;
        case 4:
            damage(image, layout_end, good_size, 1 + below(200));
            break; /* what changes: slots, leases, queue */
        case 5:
            damage(image, clients, good_size, 1 + below(2000));
            break;
        default: /* noise behind a good beginning */
            for (size_t i = 16 + below(500); i < good_size; ++i) image[i] = (uint8_t)roll();
    }
    put(image, size);
    result = open_damaged(name);
    CHECK(result == CF_SUCCESS || result == CF_ERROR_BAD_RING || result == CF_ERROR_TOO_MANY_READERS);
}

/* Damage while everybody works ------------------------------------------------------------------------------------- */

static atomic_int stop;

typedef struct target {
    uint8_t* memory;
    size_t size, from;
} target;

static void* scribble(void* argument) {
    const target* at = argument;
    uint64_t state = 88172645463325252u; /* a generator of its own */
    while (!atomic_load(&stop)) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        /* mostly where structure lies: a random byte of so much frame would hit nothing */
        const size_t span = state & 1 ? 2048 : at->size - at->from;
        _Atomic uint64_t* word = (_Atomic uint64_t*)(void*)(at->memory + at->from + (state >> 8) % span / 8 * 8);
        const uint64_t now = atomic_load_explicit(word, memory_order_relaxed);
        const uint64_t values[] = {state, now + 1, now - 1, 0, UINT64_MAX, now ^ 255, state & 0xff};
        atomic_store_explicit(word, values[(state >> 3) % 7], memory_order_relaxed);
        if ((state >> 40) % 8 == 0) usleep(1);
    }
    return NULL;
}

static void damage_in_flight(const char* name, bool clients_part, double seconds) {
    shm_unlink(path);
    cf_writer* writer = make_ring(name, 16, 4, 3, 8);
    const int file = shm_open(path, O_RDWR, 0);
    CHECK(file >= 0);
    target at = {mmap(NULL, good_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0), good_size, 0};
    close(file);
    CHECK(at.memory != MAP_FAILED);
    const cf_ring_header* header = (const cf_ring_header*)(const void*)at.memory;
    at.from = clients_part ? (size_t)header->layout.leases_offset : 0;
    cf_session* session = open_session(name, 0);
    pthread_t thread;
    atomic_store(&stop, 0);
    CHECK(pthread_create(&thread, NULL, scribble, &at) == 0);
    const int64_t until = cf_now_ns() + (int64_t)(seconds * 1e9);
    uint64_t rounds = 0;
    for (; cf_now_ns() < until; ++rounds) {
        cf_writable slot;
        cf_writer_event event;
        cf_writer_stats stats;
        if (cf_writer_begin(writer, &slot) == CF_SUCCESS)
            CHECK(cf_writer_commit(writer, &(cf_publish_info){0}) == CF_SUCCESS);
        for (int i = 0; i < 8 && cf_writer_take_event(writer, &event) == CF_SUCCESS; ++i)
            CHECK(event.kind >= CF_EVENT_PROMPT && event.kind <= CF_EVENT_RESET && event.bytes <= CF_PROMPT_BYTES);
        cf_writer_stats_get(writer, &stats);
        use(session, 3);
    }
    atomic_store(&stop, 1);
    pthread_join(thread, NULL);
    cf_session_close(session);
    cf_writer_close(writer);
    munmap(at.memory, at.size);
    printf("%s damaged in flight: %" PRIu64 " rounds\n", clients_part ? "clients' part" : "whole ring", rounds);
}

int main(int argc, char** argv) {
    CHECK(argc == 5);
    const char* name = argv[1];
    seed = strtoull(argv[2], NULL, 10) * 2654435761u + 1;
    const uint64_t cases = strtoull(argv[3], NULL, 10);
    const double seconds = strtod(argv[4], NULL);
    snprintf(path, sizeof path, "/cfengine.%s", name);
    keep_good_image(name);
    put(good, good_size);
    CHECK(open_damaged(name) == CF_SUCCESS);
    uint8_t* image = malloc(good_size);
    CHECK(image != NULL);
    for (uint64_t i = 0; i < cases; ++i) one_case(name, image);
    CHECK(opened > cases / 20 && refused > cases / 20); /* the cases reach both sides of the checks */
    printf("%" PRIu64 " cases: %" PRIu64 " opened and used, %" PRIu64 " refused\n", cases, opened, refused);
    damage_in_flight(name, false, seconds / 2);
    damage_in_flight(name, true, seconds / 2);
    shm_unlink(path);
    free(image);
    free(good);
    return 0;
}
