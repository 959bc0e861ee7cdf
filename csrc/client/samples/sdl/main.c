/* cfengine_view: a window on a live stream, steered by the keyboard.
 *
 * One thread. Before each picture it takes the frame that is nearest to the time when the picture will be seen, and
 * never waits for the model: where there is no new frame, the last one stays.
 */
#include <SDL.h>
#include <inttypes.h>
#include <stdio.h>

#include "keys.h"
#include "options.h"
#include "screen.h"
#include "stream.h"

#define TITLE_NS 100000000

typedef struct view {
    options options;
    stream stream;
    screen screen;
    keys keys;
    cf_frame frame; /* shown last */
    int64_t next_title_ns;
} view;

static void set_title(view* view, int64_t now_ns) {
    char title[CF_PROMPT_BYTES + 64];
    cf_stats stats = CF_STATS_INIT;
    if (now_ns < view->next_title_ns) return;
    view->next_title_ns = now_ns + TITLE_NS;
    if (view->stream.session != NULL) cf_stats_get(view->stream.session, &stats);
    if (view->keys.typing)
        snprintf(title, sizeof title, "prompt: %s_", view->keys.prompt);
    else
        snprintf(title, sizeof title,
                 "%s - %s, %.1f frames/s, late %" PRIu64 ", repeated %" PRIu64 ", skipped %" PRIu64
                 ", key to picture %.0f ms",
                 view->options.name, stream_says(&view->stream.state), view->stream.fps, stats.frames_late,
                 stats.frames_repeated, stats.frames_skipped, view->stream.latency_ms);
    SDL_SetWindowTitle(view->screen.window, title);
}

static void take_events(view* view) {
    SDL_Event event;
    while (SDL_PollEvent(&event)) {
        if (event.type == SDL_RENDER_TARGETS_RESET || event.type == SDL_RENDER_DEVICE_RESET)
            screen_forget(&view->screen);
        keys_take(&view->keys, &event, &view->stream);
    }
    keys_steer(&view->keys, &view->stream);
}

/* Take a frame and put it into the window. False: nothing was drawn. */
static bool show(view* view, bool* is_new) {
    cf_frame frame = CF_FRAME_INIT;
    *is_new = false;
    if (stream_acquire(&view->stream, screen_next_ns(&view->screen), &frame)) {
        *is_new = frame.id != view->frame.id || frame.generation != view->frame.generation;
        const bool uploaded = screen_upload(&view->screen, &frame);
        const bool whole = stream_release(&view->stream, &frame);
        if (!uploaded) fprintf(stderr, "cfengine_view: the frame was not shown: %s\n", SDL_GetError());
        if (!uploaded || !whole) {
            screen_forget(&view->screen);
            return false;
        }
        view->frame = frame;
    }
    screen_draw(&view->screen);
    return true;
}

static bool finished(const view* view, bool one_more) {
    const uint64_t frames = view->options.frames;
    return view->keys.quit || (frames != 0 && view->stream.shown + one_more >= frames);
}

static bool save(const view* view) {
    if (view->options.screenshot == NULL || screen_save(&view->screen, view->options.screenshot)) return true;
    fprintf(stderr, "cfengine_view: %s was not saved: %s\n", view->options.screenshot, SDL_GetError());
    return false;
}

static bool run(view* view) {
    for (;;) {
        bool is_new;
        const int64_t now_ns = cf_now_ns();
        if (!stream_follow(&view->stream, now_ns)) return false;
        keys_script(&view->keys, &view->options, view->stream.shown);
        take_events(view);
        set_title(view, now_ns);
        if (!show(view, &is_new)) {
            screen_wait(&view->screen);
            continue;
        }
        const bool last = finished(view, is_new);
        if (last && !save(view)) return false; /* before it is presented, which may lose it */
        screen_present(&view->screen);
        stream_seen(&view->stream, &view->frame, is_new, view->screen.presented_ns);
        if (last) return true;
    }
}

static void sum_up(const view* view) {
    cf_stats stats = CF_STATS_INIT;
    if (view->stream.session != NULL) cf_stats_get(view->stream.session, &stats);
    printf("frame %" PRIu64 " event %" PRIu64 " new %" PRIu64 " uploads %" PRIu64 " repeated %" PRIu64
           " skipped %" PRIu64 " late %" PRIu64 " latency_ms %.3f\n",
           view->frame.id, view->frame.last_event_id, stats.frames_new, view->screen.uploads, stats.frames_repeated,
           stats.frames_skipped, stats.frames_late, view->stream.latency_ms);
}

int main(int argc, char** argv) {
    static view view;
    if (!options_read(argc, argv, &view.options)) return 2;
    view.stream.name = view.options.name;
    bool good = SDL_Init(SDL_INIT_VIDEO) == 0 && screen_open(&view.screen, view.options.name, view.options.scale);
    if (good) {
        SDL_StopTextInput();
        good = run(&view);
        sum_up(&view);
    } else {
        fprintf(stderr, "cfengine_view: no window: %s\n", SDL_GetError());
    }
    cf_session_close(view.stream.session);
    screen_close(&view.screen);
    SDL_Quit();
    return good ? 0 : 1;
}
