/* The writer's half of a ring: what `cfengine._C` links and cfengine.embed.Ring wraps. Not installed: the client
 * library has readers only.
 *
 * One thread calls begin, commit, publish; one (the same or another) calls take_event; set_state, beat and stats_get
 * may come from any. close comes last.
 */
#ifndef CF_WRITER_H
#define CF_WRITER_H

#include "cfengine_client.h"
#include "convert.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cf_writer cf_writer;

typedef struct cf_writer_info {
    const char* name;
    uint32_t format; /* CF_FORMAT_* */
    uint32_t width, height;
    uint32_t fps_numerator, fps_denominator;
    uint32_t readers; /* most readers at a time, up to 16 */
    uint32_t slots;   /* readers + 2 to 250; a reader that wants every frame may be slots - readers - 2 behind */
    uint32_t events;  /* room for events; a power of two */
    int64_t stall_ns; /* silence after which RUNNING is STALLED */
    uint32_t memory;  /* CF_MEMORY_* */
    const char* handle_socket; /* absolute path of the socket that passes the handle of device memory; else NULL */
} cf_writer_info;

/* What is said of a frame. */
typedef struct cf_publish_info {
    int64_t pts_ns; /* 0: now */
    uint64_t chunk_index, last_event_id, applied_at_chunk;
    uint32_t flags; /* CF_FRAME_REPEATED, CF_FRAME_DISCONTINUITY; LATE is added where the frame is ready after pts_ns */
} cf_publish_info;

/* A slot that is being written. */
typedef struct cf_writable {
    uint64_t id;        /* the frame's id once it is committed */
    uint8_t* planes[2]; /* NULL in device memory */
    uint64_t strides[2];
    uint64_t offsets[2]; /* where each plane begins in the allocation; 0 in host memory */
} cf_writable;

typedef struct cf_writer_event {
    uint64_t id;
    int64_t pushed_ns;
    uint32_t kind;    /* CF_EVENT_* */
    uint32_t bytes;   /* of text */
    const char* text; /* UTF-8, checked, ends with a zero; valid until the next event is taken */
    cf_action action;
    cf_pose pose;
} cf_writer_event;

typedef struct cf_writer_stats {
    uint64_t published;
    uint64_t revoked; /* pins taken back from readers that were dead or late */
    uint64_t refused; /* frames that found no slot: every one was pinned, which no client of ours can do */
    uint64_t dropped; /* events of the dead, and damaged ones */
    uint32_t readers; /* leases taken now */
} cf_writer_stats;

/* Bytes from one slot's frame to the next in such a ring: slots times this is what the allocation of a ring in device
 * memory holds, which is made before the ring. INVALID_ARGUMENT. */
cf_result cf_writer_frame_stride(const cf_writer_info* info, uint64_t* bytes);

/* Make a ring; its state is LOADING. A ring that a dead writer left is replaced, and its readers come over. BUSY: a
 * living process writes that name. INVALID_ARGUMENT, OUT_OF_MEMORY, SYSTEM. */
cf_result cf_writer_create(const cf_writer_info* info, cf_writer** writer);

/* Choose the oldest slot that nobody reads, for the caller to fill. BUSY: no slot is free, or begin was called twice.
 */
cf_result cf_writer_begin(cf_writer* writer, cf_writable* slot);

/* Let go of the slot, whatever was written into it: nobody is shown it. */
void cf_writer_cancel(cf_writer* writer);

/* Show what was filled in; in device memory when the device is done with it. */
cf_result cf_writer_commit(cf_writer* writer, const cf_publish_info* info);

/* begin, convert, commit. The pixels have the ring's width and height. INVALID_ARGUMENT in device memory. */
cf_result cf_writer_publish(cf_writer* writer, cf_pixels pixels, const cf_publish_info* info, uint64_t* id);

/* Take the oldest event; NOT_READY without one. */
cf_result cf_writer_take_event(cf_writer* writer, cf_writer_event* event);

/* Set CF_STATE_*, which is a sign of life. */
cf_result cf_writer_set_state(cf_writer* writer, uint32_t state);

/* A sign of life without a frame. */
void cf_writer_beat(cf_writer* writer);

uint32_t cf_writer_state(const cf_writer* writer);
uint64_t cf_writer_generation(const cf_writer* writer);
void cf_writer_stats_get(const cf_writer* writer, cf_writer_stats* stats);

/* State ENDED, name gone, memory given back; readers keep what they have mapped. NULL is allowed. */
void cf_writer_close(cf_writer* writer);

/* Take a name away whose writer is dead or whose object is no ring. BUSY: its writer lives. NOT_FOUND. */
cf_result cf_writer_unlink(const char* name);

#ifdef __cplusplus
}
#endif

#endif
