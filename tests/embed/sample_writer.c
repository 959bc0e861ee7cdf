/* The other side of the samples' tests: plays a pattern that says in every pixel which frame it is.
 *
 *     sample_writer NAME FORMAT WIDTH HEIGHT FPS      FORMAT: rgba or nv12
 *
 * Says "ready", then one line for every event. Pauses, resumes and resets as it is told; every event counts from the
 * next frame on. Ends in order when its input ends. test_samples.py has the same pattern in numpy.
 */
#include <poll.h>
#include <stdbool.h>
#include <unistd.h>

#include "check.h"

static uint32_t width, height;

static void paint_rgba(const cf_writable* slot) {
    for (uint32_t y = 0; y < height; ++y)
        for (uint32_t x = 0; x < width; ++x) {
            uint8_t* pixel = slot->planes[0] + y * slot->strides[0] + x * 4;
            pixel[0] = (uint8_t)slot->id;
            pixel[1] = (uint8_t)(5 * x + 3 * slot->id);
            pixel[2] = (uint8_t)(7 * y + slot->id);
            pixel[3] = 255;
        }
}

/* Luma has no two neighbours alike; chroma is one value a frame, so that no way of enlarging it matters. */
static void paint_nv12(const cf_writable* slot) {
    for (uint32_t y = 0; y < height; ++y)
        for (uint32_t x = 0; x < width; ++x)
            slot->planes[0][y * slot->strides[0] + x] = (uint8_t)(16 + (5 * x + 3 * y + slot->id) % 220);
    for (uint32_t y = 0; y < height / 2; ++y)
        for (uint32_t x = 0; x < width; x += 2) {
            uint8_t* pair = slot->planes[1] + y * slot->strides[1] + x;
            pair[0] = (uint8_t)(90 + slot->id % 80);
            pair[1] = (uint8_t)(170 - slot->id % 80);
        }
}

static void tell(const cf_writer_event* event) {
    static const char* const names[] = {"?", "prompt", "action", "pose", "pause", "resume", "reset"};
    printf("event %" PRIu64 " %s", event->id, names[event->kind <= CF_EVENT_RESET ? event->kind : 0]);
    if (event->kind == CF_EVENT_ACTION) printf(" %" PRIu32 " %g", event->action.code, event->action.value);
    if (event->kind == CF_EVENT_PROMPT) printf(" %s", event->text);
    puts("");
    fflush(stdout);
}

static void obey(cf_writer* writer, cf_publish_info* info) {
    cf_writer_event event;
    while (cf_writer_take_event(writer, &event) == CF_SUCCESS) {
        tell(&event);
        info->last_event_id = event.id;
        info->applied_at_chunk = info->chunk_index;
        if (event.kind == CF_EVENT_PAUSE) cf_writer_set_state(writer, CF_STATE_PAUSED);
        if (event.kind == CF_EVENT_RESUME) cf_writer_set_state(writer, CF_STATE_RUNNING);
        if (event.kind == CF_EVENT_RESET) info->flags = CF_FRAME_DISCONTINUITY;
    }
}

int main(int argc, char** argv) {
    CHECK(argc == 6);
    const bool nv12 = strcmp(argv[2], "nv12") == 0;
    const uint32_t fps = (uint32_t)atoi(argv[5]);
    width = (uint32_t)atoi(argv[3]);
    height = (uint32_t)atoi(argv[4]);
    const cf_writer_info ring = {
        argv[1], nv12 ? CF_FORMAT_NV12 : CF_FORMAT_RGBA8, width, height, fps, 1, 2, 8, 64, 1000000000, CF_MEMORY_HOST,
        NULL};
    cf_writer* writer = NULL;
    CHECK(cf_writer_create(&ring, &writer) == CF_SUCCESS);
    CHECK(cf_writer_set_state(writer, CF_STATE_RUNNING) == CF_SUCCESS);
    puts("ready");
    fflush(stdout);
    cf_publish_info info = {0};
    for (struct pollfd input = {.events = POLLIN}; poll(&input, 1, 1000 / (int)fps) == 0;) {
        obey(writer, &info);
        if (cf_writer_state(writer) == CF_STATE_PAUSED) {
            cf_writer_beat(writer);
            continue;
        }
        cf_writable slot;
        CHECK(cf_writer_begin(writer, &slot) == CF_SUCCESS);
        nv12 ? paint_nv12(&slot) : paint_rgba(&slot);
        info.chunk_index = slot.id / 4;
        info.pts_ns = cf_now_ns() + 2000000000 / fps; /* a lead of two frames */
        CHECK(cf_writer_commit(writer, &info) == CF_SUCCESS);
        info.flags = 0;
    }
    cf_writer_close(writer);
    return 0;
}
