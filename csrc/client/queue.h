/* The queue of control events: many programs push, the writer takes. */
#ifndef CF_QUEUE_H
#define CF_QUEUE_H

#include "lease.h"
#include "ring.h"

/* An event outside of shared memory. `text` holds `bytes` bytes, and a zero behind them. */
typedef struct cf_taken_event {
    uint64_t id;
    int64_t pushed_ns;
    uint32_t kind; /* CF_EVENT_* */
    uint32_t bytes;
    char text[CF_PROMPT_BYTES + 1];
    cf_action action;
    cf_pose pose;
} cf_taken_event;

/* Make every cell of a new queue free. */
void cf_queue_prepare(cf_ring_queue* queue, uint32_t count);

/* An event can be queued: kind known, text UTF-8 and short enough, numbers finite. */
cf_result cf_queue_check(const cf_event* event);

/* Queue a checked event for the owner of lease `row`. QUEUE_FULL. */
cf_result cf_queue_push(cf_ring_queue* queue, uint32_t count, uint32_t row, uint64_t owner, const cf_event* event,
                        uint64_t* id);

/* What the writer remembers of the queue; zeros at first. */
typedef struct cf_queue_reader {
    uint64_t head;            /* every event before it was taken or given up */
    _Atomic uint64_t dropped; /* events of the dead, and such as no client of ours would push */
} cf_queue_reader;

/* Take the oldest event that is complete. NOT_READY without one. */
cf_result cf_queue_take(cf_queue_reader* reader, cf_ring_queue* queue, uint32_t count, cf_ring_lease* leases,
                        uint32_t lease_count, cf_taken_event* event);

#endif
