/* Frames: choosing one by policy, pinning it (ring.h says why that is safe), letting it go. */
#include <limits.h>

#include "error.h"
#include "session.h"

#define TRIES 256         /* a writer that laps a reader between choice and pin so often is no writer of ours */
#define SLICE_NS 50000000 /* a wait looks this often whether the writer was replaced */

/* A slot and the frame that it held when it was looked at. id 0: none. */
typedef struct choice {
    uint32_t slot;
    uint64_t id;
    int64_t pts_ns;
} choice;

static uint64_t distance(int64_t a, int64_t b) { return a > b ? (uint64_t)a - (uint64_t)b : (uint64_t)b - (uint64_t)a; }

static choice look_at(const cf_mapped_ring* ring, uint32_t slot) {
    const uint64_t id = atomic_load_explicit(&ring->slots[slot].sequence, memory_order_acquire);
    const int64_t pts = atomic_load_explicit(&ring->slots[slot].pts_ns, memory_order_relaxed);
    return (choice){slot, id > CF_MOST_SEQUENCE ? 0 : id, pts};
}

/* The newest frame. BAD_RING: it names a slot that is not there. */
static cf_result newest(const cf_mapped_ring* ring, choice* best) {
    const uint64_t latest = atomic_load_explicit(&ring->header->latest, memory_order_acquire);
    const uint32_t slot = (uint32_t)(latest & 0xff);
    *best = (choice){0, 0, 0};
    if (latest == 0) return CF_NOT_READY;
    if (slot >= ring->layout.slot_count)
        return cf_fail(CF_ERROR_BAD_RING, "the newest frame is said to be in slot %u of %u; start the writer again",
                       slot, ring->layout.slot_count);
    *best = (choice){slot, latest >> 8 & CF_MOST_SEQUENCE,
                     atomic_load_explicit(&ring->slots[slot].pts_ns, memory_order_relaxed)};
    return CF_SUCCESS;
}

/* The oldest frame after `last`. */
static cf_result next(const cf_mapped_ring* ring, uint64_t last, choice* best) {
    *best = (choice){0, 0, 0};
    for (uint32_t i = 0; i < ring->layout.slot_count; ++i) {
        const choice found = look_at(ring, i);
        if (found.id > last && (best->id == 0 || found.id < best->id)) *best = found;
    }
    return best->id != 0 ? CF_SUCCESS : CF_NOT_READY;
}

/* The frame nearest to `time`, `last` or a later one; of two equally near the later. */
static cf_result nearest(const cf_mapped_ring* ring, uint64_t last, int64_t time, choice* best) {
    *best = (choice){0, 0, 0};
    for (uint32_t i = 0; i < ring->layout.slot_count; ++i) {
        const choice found = look_at(ring, i);
        if (found.id == 0 || found.id < last) continue;
        const uint64_t here = distance(found.pts_ns, time), there = distance(best->pts_ns, time);
        if (best->id == 0 || here < there || (here == there && found.id > best->id)) *best = found;
    }
    return best->id != 0 ? CF_SUCCESS : CF_NOT_READY;
}

/* Choose by policy. *settled: waiting would not bring a better one. */
static cf_result choose(const cf_session* session, const cf_mapped_ring* ring, uint32_t policy, int64_t time,
                        choice* best, bool* settled) {
    const uint64_t last = session->last_generation == ring->layout.generation ? session->last_id : 0;
    cf_result result;
    if (policy == CF_POLICY_NEXT) {
        *settled = true;
        return next(ring, last, best);
    }
    if (policy == CF_POLICY_NEAREST) {
        choice latest;
        result = newest(ring, &latest);
        *settled = result == CF_SUCCESS && latest.pts_ns >= time;
        return result == CF_SUCCESS ? nearest(ring, last, time, best) : result;
    }
    result = newest(ring, best);
    if (result == CF_SUCCESS && best->id < last)
        result = next(ring, last - 1, best); /* `latest` is stored after its slot */
    *settled = best->id != last;
    return result;
}

/* P and Q of ring.h. The deadline goes first: who sees the pin sees it too. */
static bool pin(cf_session* session, cf_mapped_ring* ring, choice chosen, int64_t now) {
    cf_ring_lease* lease = &ring->leases[ring->row];
    session->held_pin = cf_lease_pin(chosen.id, session->pin_count++, chosen.slot);
    atomic_store_explicit(&lease->deadline_ns, now + session->lease_ns, memory_order_relaxed);
    atomic_store_explicit(&lease->pin, session->held_pin, memory_order_seq_cst);
    if (atomic_load_explicit(&ring->slots[chosen.slot].sequence, memory_order_seq_cst) == chosen.id) return true;
    atomic_store_explicit(&lease->pin, 0, memory_order_release);
    return false;
}

static void describe_planes(const cf_mapped_ring* ring, uint32_t slot, cf_frame* frame) {
    const cf_ring_layout* layout = &ring->layout;
    const bool nv12 = layout->format == CF_FORMAT_NV12, host = ring->frames != NULL;
    const uint64_t at = slot * cf_ring_frame_stride(layout);
    const uint8_t* pixels = host ? ring->frames + at : NULL;
    const uint8_t* chroma = host && nv12 ? pixels + layout->chroma_offset : NULL;
    frame->format = layout->format;
    frame->memory = layout->memory;
    frame->width = layout->width;
    frame->height = layout->height;
    frame->plane_count = nv12 ? 2 : 1;
    frame->planes[0] = (cf_plane){pixels, layout->strides[0], (uint64_t)layout->strides[0] * layout->height};
    frame->planes[1] = nv12
                           ? (cf_plane){chroma, layout->strides[1], (uint64_t)layout->strides[1] * (layout->height / 2)}
                           : (cf_plane){NULL, 0, 0};
    if (frame->header.struct_size < sizeof *frame) return; /* of a program of version 1.0 */
    frame->offsets[0] = host ? 0 : at;
    frame->offsets[1] = host || !nv12 ? 0 : at + layout->chroma_offset;
}

/* Tell about the pinned frame, and remember that this session had it. */
static void describe(cf_session* session, cf_mapped_ring* ring, choice chosen, int64_t time, cf_frame* frame) {
    const cf_ring_slot* slot = &ring->slots[chosen.slot];
    const uint64_t generation = ring->layout.generation;
    const bool same_writer = session->last_generation == generation;
    const bool again = same_writer && session->last_id == chosen.id;
    const int64_t period = (int64_t)(INT64_C(1000000000) * ring->layout.fps_denominator / ring->layout.fps_numerator);
    frame->id = chosen.id;
    frame->generation = generation;
    frame->pts_ns = atomic_load_explicit(&slot->pts_ns, memory_order_relaxed);
    frame->ready_ns = atomic_load_explicit(&slot->ready_ns, memory_order_relaxed);
    frame->chunk_index = atomic_load_explicit(&slot->chunk_index, memory_order_relaxed);
    frame->last_event_id = atomic_load_explicit(&slot->last_event_id, memory_order_relaxed);
    frame->applied_at_chunk = atomic_load_explicit(&slot->applied_at_chunk, memory_order_relaxed);
    frame->flags = atomic_load_explicit(&slot->flags, memory_order_relaxed);
    if (again) frame->flags |= CF_FRAME_REPEATED;
    if (session->last_generation != 0 && !same_writer) frame->flags |= CF_FRAME_DISCONTINUITY;
    if (frame->pts_ns < time && distance(frame->pts_ns, time) > (uint64_t)period) frame->flags |= CF_FRAME_LATE;
    describe_planes(ring, chosen.slot, frame);

    count(again ? &session->stats.frames_repeated : &session->stats.frames_new);
    if (!again && frame->flags & CF_FRAME_LATE) count(&session->stats.frames_late);
    if (same_writer && chosen.id > session->last_id + 1)
        atomic_fetch_add_explicit(&session->stats.frames_skipped, chosen.id - session->last_id - 1,
                                  memory_order_relaxed);
    session->last_generation = generation;
    session->last_id = session->held_id = chosen.id;
    atomic_store(&session->held, ring);
}

/* One attempt. NOT_READY: nothing, or nothing worth having while there is time left. */
static cf_result attempt(cf_session* session, cf_mapped_ring* ring, const cf_acquire_info* info, int64_t now, bool last,
                         cf_frame* frame) {
    const int64_t time = info->display_time_ns != 0 ? info->display_time_ns : now;
    for (int tries = 0; tries < TRIES; ++tries) {
        choice chosen;
        bool settled;
        const cf_result result = choose(session, ring, info->policy, time, &chosen, &settled);
        if (result != CF_SUCCESS) return result;
        if (!settled && !last) return CF_NOT_READY;
        if (!pin(session, ring, chosen, now)) continue;
        describe(session, ring, chosen, time, frame);
        return CF_SUCCESS;
    }
    return CF_NOT_READY;
}

static cf_result check_info(const cf_session* session, const cf_acquire_info* info, const cf_frame* frame) {
    if (session == NULL) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the session is NULL; open one");
    cf_result result = cf_check_struct(info, CF_STRUCT_ACQUIRE_INFO, sizeof *info, "cf_acquire_info");
    if (result == CF_SUCCESS) result = cf_check_struct(frame, CF_STRUCT_FRAME, CF_FRAME_LEAST, "cf_frame");
    if (result < 0) return result;
    if (info->policy > CF_POLICY_NEAREST || info->reserved != 0)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "policy %u (reserved %u) is unknown; choose LATEST, NEXT or NEAREST, and 0", info->policy,
                       info->reserved);
    if (info->timeout_ns < 0)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "timeout_ns is %lld; give 0 to return at once, or a time to wait",
                       (long long)info->timeout_ns);
    if (session->held != NULL)
        return cf_fail(CF_ERROR_FRAME_HELD, "frame %llu is held still; release it before the next acquire",
                       (unsigned long long)session->held_id);
    return CF_SUCCESS;
}

/* Account for a call that took `ns` without its waiting. The consumer alone comes here. */
static void account(cf_session* session, cf_result result, int64_t ns) {
    if (result != CF_SUCCESS) count(&session->stats.not_ready);
    count(&session->stats.acquires);
    atomic_store_explicit(&session->stats.acquire_last_ns, ns, memory_order_relaxed);
    atomic_fetch_add_explicit(&session->stats.acquire_total_ns, ns, memory_order_relaxed);
    if (ns > atomic_load_explicit(&session->stats.acquire_longest_ns, memory_order_relaxed))
        atomic_store_explicit(&session->stats.acquire_longest_ns, ns, memory_order_relaxed);
}

cf_result cf_frame_acquire(cf_session* session, const cf_acquire_info* info, cf_frame* frame) {
    cf_result result = check_info(session, info, frame);
    if (result < 0) return result;
    const int64_t started = cf_os_now_ns();
    const int64_t until = info->timeout_ns > INT64_MAX - started ? INT64_MAX : started + info->timeout_ns;
    int64_t now = started, waited = 0;
    for (;;) {
        cf_session_follow(session, now);
        cf_mapped_ring* ring = cf_session_enter(session);
        const uint32_t seen = atomic_load_explicit(&ring->header->wake, memory_order_acquire); /* before the search */
        const bool last = now >= until;
        result = attempt(session, ring, info, now, last, frame);
        const bool wait = result == CF_NOT_READY && !last;
        if (wait) cf_os_wait(&ring->header->wake, seen, until - now < SLICE_NS ? until - now : SLICE_NS);
        cf_session_leave(session);
        if (!wait) break;
        const int64_t woken = cf_os_now_ns();
        waited += woken - now;
        now = woken;
    }
    account(session, result, cf_os_now_ns() - started - waited);
    return result;
}

cf_result cf_frame_release(cf_session* session, uint64_t frame_id) {
    if (session == NULL) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the session is NULL; open one");
    cf_mapped_ring* ring = atomic_load(&session->held);
    if (ring == NULL || session->held_id != frame_id)
        return cf_fail(CF_ERROR_NOT_HELD, "frame %llu is not held; release each frame that was acquired once",
                       (unsigned long long)frame_id);
    uint64_t expected = session->held_pin;
    const bool ours = atomic_compare_exchange_strong_explicit(&ring->leases[ring->row].pin, &expected, 0,
                                                              memory_order_acq_rel, memory_order_relaxed);
    atomic_store(&session->held, NULL); /* from here on the ring may be unmapped */
    if (ours) return CF_SUCCESS;
    count(&session->stats.leases_lost);
    return cf_fail(CF_ERROR_LEASE_LOST,
                   "frame %llu was held for longer than its lease of %lld ms, and the writer took it back",
                   (unsigned long long)frame_id, (long long)(session->lease_ns / 1000000));
}
