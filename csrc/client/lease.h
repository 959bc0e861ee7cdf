/* Leases: who reads, and which slot is pinned. Both halves of the ring use them. */
#ifndef CF_LEASE_H
#define CF_LEASE_H

#include <stdbool.h>

#include "os.h"
#include "ring.h"

/* owner: pid << 32 | low 23 bits of the process's start time << 9 | taken << 8 | epoch, which grows with every owner.
 * One word, so that pid and start time are never of two processes. A free lease keeps its epoch. pid 0: a reader whose
 * pid means nothing to the writer (another pid namespace); it counts as alive until its deadline is CF_LEASE_SILENCE_NS
 * past. */
#define CF_LEASE_START_MASK UINT64_C(0x7fffff)
#define CF_LEASE_TAKEN UINT64_C(0x100)
#define CF_LEASE_SILENCE_NS (2 * (int64_t)CF_LONGEST_LEASE_NS)

static inline uint8_t cf_lease_epoch(uint64_t owner) { return (uint8_t)owner; }

/* pin: sequence << 16 | count << 8 | slot + 1. 48 bits of sequence last for 8,900 years at 1,000 frames a second. */
#define CF_MOST_SEQUENCE ((UINT64_C(1) << 48) - 1)

static inline uint64_t cf_lease_pin(uint64_t sequence, uint8_t count, uint32_t slot) {
    return sequence << 16 | (uint64_t)count << 8 | (slot + 1);
}

/* Slot that a pin names; -1 without one. */
static inline int cf_lease_pinned(uint64_t pin) { return (int)(pin & 0xff) - 1; }

/* The lease is free, or its owner is gone. */
bool cf_lease_dead(uint64_t owner, int64_t deadline_ns, int64_t now_ns);

/* Take a free lease or one of the dead. `space`: the writer's. NOT_READY where all are taken. */
cf_result cf_lease_claim(cf_ring_lease* leases, uint32_t count, cf_os_process self, uint64_t space, uint32_t* row,
                         uint64_t* owner);

/* Give it back, unless it is somebody else's by now. */
void cf_lease_free(cf_ring_lease* lease, uint64_t owner);

/* The writer's question: does a living, punctual reader pin this slot? Pins of others are taken back, each of which
 * adds one to *revoked. */
bool cf_lease_blocks(cf_ring_lease* leases, uint32_t count, uint32_t slot, int64_t now_ns, uint64_t* revoked);

#endif
