/* The stream: opens the ring, follows its writer, takes frames, measures how long an event takes to be seen. */
#ifndef VIEW_STREAM_H
#define VIEW_STREAM_H

#include <stdbool.h>
#include <stdint.h>

#include "cfengine_client.h"

enum { MOST_WAITING = 32 };

/* An event on its way, pushed at `pushed_ns`. */
typedef struct waiting_event {
    uint64_t id;
    int64_t pushed_ns;
} waiting_event;

typedef struct stream {
    const char* name;
    cf_session* session; /* NULL: no writer was found yet */
    int64_t next_look_ns;
    cf_result said;         /* what opening or acquiring said last */
    cf_session_state state; /* state 0: none yet */
    waiting_event waiting[MOST_WAITING];
    int waiting_count;
    double latency_ms; /* of the last event that was seen; 0: none yet */
    uint64_t shown;    /* new frames, over all writers */
    double fps;        /* new frames a second, lately */
    uint64_t counted;
    int64_t counted_ns;
} stream;

/* Look for the writer, and say on stderr when it comes, goes or changes. Cheap; call it before each picture. False: the
 * name cannot be, or the library is of another version, which no waiting would change. */
bool stream_follow(stream* stream, int64_t now_ns);

/* Pin the frame that is nearest to `display_ns`; never waits. False: there is none. */
bool stream_acquire(stream* stream, int64_t display_ns, cf_frame* frame);

/* Let go. False: the frame was taken back while it was read, and must not be shown. */
bool stream_release(stream* stream, const cf_frame* frame);

/* Send an event. False: it could not be queued; stderr says why. */
bool stream_push(stream* stream, const cf_event* event);

/* The frame was put on the display at `now_ns`. */
void stream_seen(stream* stream, const cf_frame* frame, bool is_new, int64_t now_ns);

/* What a writer is: "running", ... */
const char* stream_says(const cf_session_state* state);

#endif
