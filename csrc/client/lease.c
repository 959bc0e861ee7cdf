/* Claiming, freeing and taking back of leases. */
#include "lease.h"

bool cf_lease_dead(uint64_t owner, int64_t deadline_ns, int64_t now_ns) {
    const uint32_t pid = (uint32_t)(owner >> 32);
    if (!(owner & CF_LEASE_TAKEN)) return true;
    if (pid == 0) return deadline_ns < now_ns - CF_LEASE_SILENCE_NS;
    return !cf_os_alive(pid, owner >> 9 & CF_LEASE_START_MASK, CF_LEASE_START_MASK);
}

/* Put a new owner in the place of a free or dead one. */
static bool take(cf_ring_lease* lease, uint64_t found, uint64_t identity, uint64_t* owner) {
    *owner = identity | CF_LEASE_TAKEN | (uint8_t)(cf_lease_epoch(found) + 1);
    if (!atomic_compare_exchange_strong_explicit(&lease->owner, &found, *owner, memory_order_acq_rel,
                                                 memory_order_relaxed))
        return false;
    atomic_store_explicit(&lease->deadline_ns, cf_os_now_ns(), memory_order_relaxed);
    atomic_store_explicit(&lease->pin, 0, memory_order_release); /* of the dead */
    return true;
}

cf_result cf_lease_claim(cf_ring_lease* leases, uint32_t count, cf_os_process self, uint64_t space, uint32_t* row,
                         uint64_t* owner) {
    const uint64_t identity =
        self.space == space ? (uint64_t)self.pid << 32 | (self.start & CF_LEASE_START_MASK) << 9 : 0;
    for (int of_the_dead = 0; of_the_dead < 2; ++of_the_dead) { /* free ones first: asking for the dead costs more */
        for (*row = 0; *row < count; ++*row) {
            cf_ring_lease* lease = &leases[*row];
            const uint64_t found = atomic_load_explicit(&lease->owner, memory_order_acquire);
            const int64_t deadline = atomic_load_explicit(&lease->deadline_ns, memory_order_relaxed);
            const bool free = of_the_dead ? cf_lease_dead(found, deadline, cf_os_now_ns()) : !(found & CF_LEASE_TAKEN);
            if (free && take(lease, found, identity, owner)) return CF_SUCCESS;
        }
    }
    return CF_NOT_READY;
}

void cf_lease_free(cf_ring_lease* lease, uint64_t owner) {
    if (atomic_load_explicit(&lease->owner, memory_order_relaxed) != owner) return;
    atomic_store_explicit(&lease->pin, 0, memory_order_release);
    atomic_compare_exchange_strong_explicit(&lease->owner, &owner, cf_lease_epoch(owner), memory_order_acq_rel,
                                            memory_order_relaxed);
}

bool cf_lease_blocks(cf_ring_lease* leases, uint32_t count, uint32_t slot, int64_t now_ns, uint64_t* revoked) {
    bool blocked = false;
    for (uint32_t i = 0; i < count; ++i) {
        cf_ring_lease* lease = &leases[i];
        uint64_t pin = atomic_load_explicit(&lease->pin, memory_order_seq_cst); /* L in ring.h */
        if (cf_lease_pinned(pin) != (int)slot) continue;
        const int64_t deadline = atomic_load_explicit(&lease->deadline_ns, memory_order_relaxed);
        const uint64_t owner = atomic_load_explicit(&lease->owner, memory_order_relaxed);
        if (deadline >= now_ns && !cf_lease_dead(owner, deadline, now_ns)) {
            blocked = true;
        } else if (atomic_compare_exchange_strong_explicit(&lease->pin, &pin, 0, memory_order_seq_cst,
                                                           memory_order_seq_cst)) {
            ++*revoked;
        } else if (cf_lease_pinned(pin) == (int)slot) {
            blocked = true; /* pinned anew a moment ago */
        }
    }
    return blocked;
}
