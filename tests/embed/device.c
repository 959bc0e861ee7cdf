/* A program on the other side of device memory. Its device is a stand-in: a file descriptor that mmap takes.
 *
 *     device read NAME COUNT WRITERS    imports the memory of each writer, then compares every byte of COUNT frames
 *     device ask NAME                   for each line of input: asks for the memory, says what came of it
 *     device hold NAME                  imports, holds a frame, says "held", sleeps until it is killed
 *
 * Frame `id` has red 5x + 3id, green 7y + id and blue x ^ y ^ id at (x, y); standin.py has the same.
 */
#include <dirent.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

enum { MOST = 1 << 20 };
static uint8_t rgb[3 * MOST], luma[MOST], chroma[MOST];

static void say(const char* text) {
    puts(text);
    fflush(stdout);
}

static cf_session* open_device(const char* name) {
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* session = NULL;
    info.name = name;
    info.lease_ns = CF_LONGEST_LEASE_NS;
    info.flags = CF_SESSION_DEVICE_MEMORY;
    CHECK(cf_session_open(&info, &session) == CF_SUCCESS);
    return session;
}

static int open_descriptors(void) {
    int count = 0;
    DIR* folder = opendir("/proc/self/fd");
    CHECK(folder != NULL);
    while (readdir(folder) != NULL) ++count;
    closedir(folder);
    return count;
}

static const uint8_t* import_memory(cf_session* session, cf_device_memory* memory) {
    *memory = (cf_device_memory)CF_DEVICE_MEMORY_INIT;
    CHECK(cf_session_device_memory(session, memory) == CF_SUCCESS);
    CHECK(memory->memory == CF_MEMORY_OPAQUE_FD && memory->fd >= 0);
    CHECK(memcmp(memory->device_uuid, "stand-in device!", 16) == 0);
    const uint8_t* bytes = mmap(NULL, memory->size, PROT_READ, MAP_SHARED, memory->fd, 0);
    CHECK(bytes != MAP_FAILED && close(memory->fd) == 0);
    return bytes;
}

static void paint(const cf_frame* frame) {
    CHECK((uint64_t)frame->width * frame->height <= MOST);
    for (uint32_t y = 0; y < frame->height; ++y)
        for (uint32_t x = 0; x < frame->width; ++x) {
            uint8_t* pixel = rgb + 3 * ((size_t)y * frame->width + x);
            pixel[0] = (uint8_t)(5 * x + 3 * frame->id);
            pixel[1] = (uint8_t)(7 * y + frame->id);
            pixel[2] = (uint8_t)(x ^ y ^ frame->id);
        }
}

static uint64_t wrong_rgba(const cf_frame* frame, const uint8_t* plane) {
    uint64_t wrong = 0;
    for (uint32_t y = 0; y < frame->height; ++y)
        for (uint32_t x = 0; x < frame->width; ++x) {
            const uint8_t *seen = plane + y * frame->planes[0].stride + 4 * x,
                          *pixel = rgb + 3 * (y * frame->width + x);
            wrong += memcmp(seen, pixel, 3) != 0 || seen[3] != 255;
        }
    return wrong;
}

/* The conversion on the device against the one in C. */
static uint64_t wrong_nv12(const cf_frame* frame, const uint8_t* first, const uint8_t* second) {
    const uint32_t width = frame->width;
    uint64_t wrong = 0;
    cf_convert_nv12((cf_pixels){rgb, 3 * width, 3, width, frame->height}, luma, width, chroma, width);
    for (uint32_t y = 0; y < frame->height; ++y) {
        wrong += memcmp(first + y * frame->planes[0].stride, luma + y * width, width) != 0;
        if (y % 2 == 0) wrong += memcmp(second + y / 2 * frame->planes[1].stride, chroma + y / 2 * width, width) != 0;
    }
    return wrong;
}

static void compare(const cf_frame* frame, const uint8_t* bytes, const cf_device_memory* memory) {
    CHECK(frame->memory == memory->memory && frame->generation == memory->generation);
    for (uint32_t i = 0; i < frame->plane_count; ++i) {
        CHECK(frame->planes[i].data == NULL && frame->planes[i].size > 0);
        CHECK(frame->planes[i].size <= memory->frame_stride && frame->offsets[i] <= memory->size);
        CHECK(frame->planes[i].size <= memory->size - frame->offsets[i]);
    }
    CHECK(frame->offsets[0] % memory->frame_stride == 0 && frame->offsets[0] / memory->frame_stride < memory->slots);
    paint(frame);
    CHECK((frame->format == CF_FORMAT_NV12 ? wrong_nv12(frame, bytes + frame->offsets[0], bytes + frame->offsets[1])
                                           : wrong_rgba(frame, bytes + frame->offsets[0])) == 0);
}

static int read_frames(const char* name, int count, int writers) {
    cf_session* session = open_device(name);
    cf_device_memory memory = CF_DEVICE_MEMORY_INIT;
    const uint8_t* bytes = NULL;
    const int before = open_descriptors();
    for (int writer = 1; writer <= writers; ++writer) {
        const uint64_t old = memory.generation;
        for (int seen = 0; seen < count;) {
            cf_frame frame;
            const cf_result result = acquire(session, CF_POLICY_NEXT, 30000000000, &frame);
            CHECK(result == CF_SUCCESS);
            if (frame.generation != memory.generation) {
                if (bytes != NULL) munmap((void*)(uintptr_t)bytes, memory.size);
                bytes = import_memory(session, &memory);
                CHECK(memory.generation == frame.generation && memory.generation != old && seen == 0);
                CHECK(writer == 1 || frame.flags & CF_FRAME_DISCONTINUITY);
                printf("writer %d imported\n", writer);
            }
            compare(&frame, bytes, &memory);
            CHECK(cf_frame_release(session, frame.id) == CF_SUCCESS);
            ++seen;
        }
        printf("writer %d read %d\n", writer, count);
        fflush(stdout);
    }
    CHECK(open_descriptors() == before);
    munmap((void*)(uintptr_t)bytes, memory.size);
    cf_session_close(session);
    return 0;
}

static int ask(const char* name) {
    cf_session* session = open_device(name);
    const int before = open_descriptors();
    char line[64];
    say("open");
    while (fgets(line, sizeof line, stdin) != NULL) {
        cf_device_memory memory = CF_DEVICE_MEMORY_INIT;
        memory.fd = 12345;
        const int64_t start = cf_now_ns();
        const cf_result result = cf_session_device_memory(session, &memory);
        CHECK(cf_now_ns() - start < 20000000000); /* a second, on a machine that is busy */
        CHECK(result == CF_SUCCESS || (result < 0 && memory.fd == -1 && cf_last_error()[0] != 0));
        if (memory.fd >= 0) close(memory.fd);
        printf("%s %d %s\n", cf_result_name(result), open_descriptors() - before,
               result == CF_SUCCESS ? "" : cf_last_error());
        fflush(stdout);
    }
    cf_session_close(session);
    return 0;
}

static int hold(const char* name) {
    cf_session* session = open_device(name);
    cf_device_memory memory;
    cf_frame frame;
    CHECK(acquire(session, CF_POLICY_LATEST, 30000000000, &frame) == CF_SUCCESS);
    compare(&frame, import_memory(session, &memory), &memory);
    say("held");
    for (;;) nanosleep(&(struct timespec){1, 0}, NULL);
}

int main(int argc, char** argv) {
    CHECK(argc >= 3);
    if (strcmp(argv[1], "ask") == 0) return ask(argv[2]);
    if (strcmp(argv[1], "hold") == 0) return hold(argv[2]);
    CHECK(argc == 5);
    return read_frames(argv[2], atoi(argv[3]), atoi(argv[4]));
}
