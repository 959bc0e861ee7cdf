/* The stream: opens the ring, follows its writer, takes frames, measures how long an event takes to be seen. */
#include "stream.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define LOOK_NS 100000000   /* between two looks at the writer */
#define COUNT_NS 1000000000 /* that `fps` is of */

const char* stream_says(const cf_session_state* state) {
    static const char* const names[] = {"awaited", "loading", "ready",  "running",
                                        "paused",  "stalled", "failed", "ended"};
    if (state->state == CF_STATE_ERROR && !state->writer_alive) return "gone";
    return state->state < sizeof names / sizeof *names ? names[state->state] : "unknown";
}

static bool open_ring(stream* stream) {
    cf_session_info info = CF_SESSION_INFO_INIT;
    info.name = stream->name;
    const cf_result result = cf_session_open(&info, &stream->session);
    if (result < 0 && result != stream->said) fprintf(stderr, "cfengine_view: %s\n", cf_last_error());
    stream->said = result;
    return result != CF_ERROR_INVALID_ARGUMENT && result != CF_ERROR_VERSION;
}

/* Another writer knows nothing of the events that the last one was told. */
static void begin_generation(stream* stream, const cf_session_state* state) {
    fprintf(stderr, "cfengine_view: writer %s: %" PRIu32 " x %" PRIu32 " %s\n",
            stream->state.generation == 0 ? "found" : "restarted", state->width, state->height,
            state->format == CF_FORMAT_NV12 ? "NV12" : "RGBA8");
    stream->waiting_count = 0;
}

static void poll(stream* stream) {
    cf_session_state state = CF_SESSION_STATE_INIT;
    if (cf_session_poll_state(stream->session, &state) < 0) return;
    if (state.generation != stream->state.generation) begin_generation(stream, &state);
    if (state.state != stream->state.state) fprintf(stderr, "cfengine_view: writer is %s\n", stream_says(&state));
    stream->state = state;
}

static void count_frames(stream* stream, int64_t now_ns) {
    const int64_t span = now_ns - stream->counted_ns;
    if (span < COUNT_NS) return;
    stream->fps = stream->counted_ns == 0 ? 0 : (double)(stream->shown - stream->counted) * 1e9 / (double)span;
    stream->counted = stream->shown;
    stream->counted_ns = now_ns;
}

bool stream_follow(stream* stream, int64_t now_ns) {
    count_frames(stream, now_ns);
    if (now_ns < stream->next_look_ns) return true;
    stream->next_look_ns = now_ns + LOOK_NS;
    if (stream->session == NULL && !open_ring(stream)) return false;
    if (stream->session != NULL) poll(stream);
    return true;
}

bool stream_acquire(stream* stream, int64_t display_ns, cf_frame* frame) {
    cf_acquire_info info = CF_ACQUIRE_INFO_INIT;
    info.display_time_ns = display_ns;
    info.policy = CF_POLICY_NEAREST;
    if (stream->session == NULL) return false;
    const cf_result result = cf_frame_acquire(stream->session, &info, frame);
    if (result < 0 && result != stream->said) fprintf(stderr, "cfengine_view: %s\n", cf_last_error());
    stream->said = result;
    if (result != CF_SUCCESS) return false;
    if (frame->generation != stream->state.generation) poll(stream);
    return true;
}

bool stream_release(stream* stream, const cf_frame* frame) {
    return cf_frame_release(stream->session, frame->id) == CF_SUCCESS;
}

bool stream_push(stream* stream, const cf_event* event) {
    uint64_t id = 0;
    if (stream->session == NULL) return false;
    const int64_t now_ns = cf_now_ns();
    if (cf_session_push(stream->session, event, &id) < 0) {
        fprintf(stderr, "cfengine_view: not sent: %s\n", cf_last_error());
        return false;
    }
    if (stream->waiting_count == MOST_WAITING)
        memmove(stream->waiting, stream->waiting + 1, --stream->waiting_count * sizeof *stream->waiting);
    stream->waiting[stream->waiting_count++] = (waiting_event){id, now_ns};
    return true;
}

void stream_seen(stream* stream, const cf_frame* frame, bool is_new, int64_t now_ns) {
    int kept = 0;
    stream->shown += is_new;
    if (frame->generation != stream->state.generation) return; /* it is of the last writer, with other events */
    for (int i = 0; i < stream->waiting_count; ++i) {
        if (stream->waiting[i].id <= frame->last_event_id)
            stream->latency_ms = (double)(now_ns - stream->waiting[i].pushed_ns) / 1e6;
        else
            stream->waiting[kept++] = stream->waiting[i];
    }
    stream->waiting_count = kept;
}
