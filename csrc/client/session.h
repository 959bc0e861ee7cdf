/* What a session is made of. client.c opens, follows and closes; acquire.c reads frames. */
#ifndef CF_SESSION_H
#define CF_SESSION_H

#include "lease.h"
#include "os.h"
#include "ring.h"

/* What a structure has at least, as programs of version 1.0 pass it. */
#define CF_SESSION_INFO_LEAST offsetof(cf_session_info, flags)
#define CF_FRAME_LEAST offsetof(cf_frame, offsets)

/* One mapped ring: constants checked, a lease taken. It does not change until it is unmapped. */
typedef struct cf_mapped_ring {
    cf_ring_layout layout; /* the checked copy; the one in shared memory is not looked at again */
    uint64_t identity[2];
    const uint8_t* memory; /* the writer's part, read-only */
    uint8_t* shared;       /* the clients' part */
    const cf_ring_header* header;
    const cf_ring_slot* slots;
    const uint8_t* frames; /* NULL where they are in device memory */
    cf_ring_lease* leases;
    cf_ring_queue* queue;
    uint32_t row; /* of its lease */
    uint64_t owner;
    struct cf_mapped_ring* older; /* in the list of those that wait to be unmapped */
} cf_mapped_ring;

/* Threads other than the consumer may be inside a ring when its successor comes. So everybody counts himself in `users`
 * before he reads `current`; the old ring is unmapped only when `users` was seen at 0 after `current` had changed (all
 * of it seq_cst): who came before is gone, who comes later finds the new one. A frame that is held keeps its ring too.
 */
struct cf_session {
    char name[CF_NAME_BYTES + 1];
    int64_t lease_ns;
    uint32_t flags; /* CF_SESSION_* */
    cf_os_process self;
    _Atomic(cf_mapped_ring*) current;
    _Atomic uint32_t users;
    atomic_flag following;            /* one thread at a time looks for a successor; others go on with what there is */
    _Atomic(cf_mapped_ring*) retired; /* list of rings to unmap; changes under `following` */
    _Atomic int64_t next_look_ns;
    _Atomic(cf_mapped_ring*) held; /* ring of the frame that is held */

    /* the consumer's */
    uint64_t held_id, held_pin;
    uint64_t last_generation, last_id;
    uint8_t pin_count;

    struct {
        _Atomic uint64_t frames_new, frames_repeated, frames_skipped, frames_late, not_ready, leases_lost;
        _Atomic uint64_t events_pushed, events_refused, generations, acquires;
        _Atomic int64_t acquire_last_ns, acquire_longest_ns, acquire_total_ns;
    } stats;
};

static inline void count(_Atomic uint64_t* what) { atomic_fetch_add_explicit(what, 1, memory_order_relaxed); }

/* Between the two, the ring that cf_session_enter returned stays mapped. */
cf_mapped_ring* cf_session_enter(cf_session* session);
void cf_session_leave(cf_session* session);

/* Go over to the ring that has the name now, if it is another one, or if this reader's lease is gone. Cheap when there
 * is no reason to look; looks every 100 ms at most. Not between enter and leave. */
void cf_session_follow(cf_session* session, int64_t now_ns);

#endif
