/* Sessions: finding a ring, following its writer through restarts, state, events. */
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "queue.h"
#include "session.h"

/* Without a heartbeat for so long: look whether the name has another ring, and as often; ask whether the process lives.
 */
#define SILENCE_NS 100000000
#define DOUBT_NS 250000000

/* Structures grow at the end only; a size here never changes. */
_Static_assert(sizeof(void*) != 8 || (sizeof(cf_frame) == 160 && sizeof(cf_event) == 64), "sizes are part of the ABI");
_Static_assert(sizeof(void*) != 8 || (sizeof(cf_session_state) == 80 && sizeof(cf_stats) == 120), "as above");
_Static_assert(sizeof(void*) != 8 || (sizeof(cf_session_info) == 40 && sizeof(cf_device_memory) == 136), "as above");
_Static_assert(sizeof(void*) != 8 || (CF_SESSION_INFO_LEAST == 32 && CF_FRAME_LEAST == 144), "sizes of version 1.0");

int64_t cf_now_ns(void) { return cf_os_now_ns(); }

cf_result cf_get_version(uint32_t major, cf_version* version) {
    const cf_result result = cf_check_struct(version, CF_STRUCT_VERSION, sizeof *version, "cf_version");
    if (result < 0) return result;
    version->major = CF_VERSION_MAJOR;
    version->minor = CF_VERSION_MINOR;
    version->ring_major = CF_RING_MAJOR;
    version->ring_minor = CF_RING_MINOR;
    if (major != CF_VERSION_MAJOR)
        return cf_fail(CF_ERROR_VERSION,
                       "the program was made for version %u of this library, which is %u.%u; link the other", major,
                       CF_VERSION_MAJOR, CF_VERSION_MINOR);
    return CF_SUCCESS;
}

/* Mapping ---------------------------------------------------------------------------------------------------------- */

static void unmap(cf_mapped_ring* ring, bool ours) {
    if (ring == NULL) return;
    if (ours && ring->owner != 0) cf_lease_free(&ring->leases[ring->row], ring->owner);
    cf_os_unmap((void*)ring->memory, ring->layout.leases_offset);
    cf_os_unmap(ring->shared, ring->layout.total_size - ring->layout.leases_offset);
    free(ring);
}

/* Check the constants through a map of the header alone, so that nothing is mapped by sizes not yet checked. */
static cf_result read_layout(const char* name, const cf_os_object* object, cf_ring_layout* layout) {
    void* memory = NULL;
    if (object->size < sizeof(cf_ring_header))
        return object->size == 0 ? CF_NOT_READY : cf_ring_check(name, NULL, object->size, layout);
    cf_result result = cf_os_map(object, 0, sizeof(cf_ring_header), false, &memory);
    if (result < 0) return result;
    result = cf_ring_check(name, memory, object->size, layout);
    cf_os_unmap(memory, sizeof(cf_ring_header));
    return result;
}

static cf_result map_parts(const cf_os_object* object, cf_mapped_ring* ring) {
    const cf_ring_layout* layout = &ring->layout;
    void *memory = NULL, *shared = NULL;
    cf_result result = cf_os_map(object, 0, layout->leases_offset, false, &memory);
    if (result == CF_SUCCESS) {
        ring->memory = memory;
        result = cf_os_map(object, layout->leases_offset, layout->total_size - layout->leases_offset, true, &shared);
    }
    if (result < 0) return result;
    ring->shared = shared;
    ring->header = memory;
    ring->slots = (const cf_ring_slot*)(ring->memory + layout->slots_offset);
    ring->frames = layout->memory == CF_MEMORY_HOST ? ring->memory + layout->frames_offset : NULL;
    ring->leases = shared;
    ring->queue = (cf_ring_queue*)(ring->shared + (layout->queue_offset - layout->leases_offset));
    return CF_SUCCESS;
}

/* Map the ring that `object` holds and take a lease on it. */
static cf_result attach(cf_session* session, const cf_os_object* object, cf_mapped_ring** out) {
    cf_mapped_ring* ring = calloc(1, sizeof *ring);
    if (ring == NULL) return cf_fail(CF_ERROR_OUT_OF_MEMORY, "no memory for a session on ring %s", session->name);
    memcpy(ring->identity, object->identity, sizeof ring->identity);
    cf_result result = read_layout(session->name, object, &ring->layout);
    if (result == CF_NOT_READY)
        result = cf_fail(CF_ERROR_NOT_FOUND, "ring %s is only being made; try again", session->name);
    if (result == CF_SUCCESS && ring->layout.memory != CF_MEMORY_HOST && !(session->flags & CF_SESSION_DEVICE_MEMORY))
        result = cf_fail(CF_ERROR_MEMORY_KIND,
                         "the frames of ring %s are in device memory, and this session takes host memory alone; open "
                         "it with CF_SESSION_DEVICE_MEMORY, or start the writer with host memory",
                         session->name);
    if (result == CF_SUCCESS) result = map_parts(object, ring);
    if (result == CF_SUCCESS) {
        result = cf_lease_claim(ring->leases, ring->layout.lease_count, session->self, ring->layout.writer_space,
                                &ring->row, &ring->owner);
        if (result == CF_NOT_READY) {
            ring->owner = 0;
            result = cf_fail(
                CF_ERROR_TOO_MANY_READERS,
                "ring %s has %u readers and room for no more; close one, or start its writer with room for more",
                session->name, ring->layout.lease_count);
        }
    }
    if (result < 0) {
        unmap(ring, true);
        return result;
    }
    count(&session->stats.generations);
    *out = ring;
    return CF_SUCCESS;
}

/* Following -------------------------------------------------------------------------------------------------------- */

cf_mapped_ring* cf_session_enter(cf_session* session) {
    atomic_fetch_add(&session->users, 1);
    return atomic_load(&session->current);
}

void cf_session_leave(cf_session* session) { atomic_fetch_sub(&session->users, 1); }

/* Unmap what nobody can be in. Under `following`, after `current` has changed. */
static void reclaim(cf_session* session) {
    cf_mapped_ring *ring = atomic_load(&session->retired), *kept = NULL;
    if (ring == NULL || atomic_load(&session->users) != 0) return;
    while (ring != NULL) {
        cf_mapped_ring* older = ring->older;
        if (ring == atomic_load(&session->held)) {
            ring->older = kept;
            kept = ring;
        } else {
            unmap(ring, true);
        }
        ring = older;
    }
    atomic_store(&session->retired, kept);
}

/* The lease is this reader's no more: its process was taken for dead. */
static bool lease_gone(const cf_mapped_ring* ring) {
    return atomic_load_explicit(&ring->leases[ring->row].owner, memory_order_relaxed) != ring->owner;
}

static void look(cf_session* session) {
    cf_os_object object;
    cf_mapped_ring *old = atomic_load(&session->current), *ring = NULL;
    if (cf_os_open(session->name, &object) < 0) return;
    const bool other = memcmp(object.identity, old->identity, sizeof old->identity) != 0;
    if ((other || lease_gone(old)) && attach(session, &object, &ring) == CF_SUCCESS) {
        atomic_store(&session->current, ring);
        old->older = atomic_load(&session->retired);
        atomic_store(&session->retired, old);
    }
    cf_os_close(&object);
}

void cf_session_follow(cf_session* session, int64_t now) {
    cf_mapped_ring* ring = cf_session_enter(session);
    const bool silent = atomic_load_explicit(&ring->header->heartbeat_ns, memory_order_relaxed) < now - SILENCE_NS;
    const bool due = now >= atomic_load_explicit(&session->next_look_ns, memory_order_relaxed);
    const bool wanted = due && (silent || lease_gone(ring));
    cf_session_leave(session);
    if (!wanted && atomic_load_explicit(&session->retired, memory_order_relaxed) == NULL) return;
    if (atomic_flag_test_and_set_explicit(&session->following, memory_order_acquire)) return;
    if (wanted) {
        atomic_store_explicit(&session->next_look_ns, now + SILENCE_NS, memory_order_relaxed);
        look(session);
    }
    reclaim(session);
    atomic_flag_clear_explicit(&session->following, memory_order_release);
}

/* Sessions --------------------------------------------------------------------------------------------------------- */

cf_result cf_session_open(const cf_session_info* info, cf_session** out) {
    cf_result result = cf_check_struct(info, CF_STRUCT_SESSION_INFO, CF_SESSION_INFO_LEAST, "cf_session_info");
    if (result < 0) return result;
    if (out == NULL) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the place for the session is NULL; pass an address");
    *out = NULL;
    if (!cf_is_name(info->name))
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "that is no name of a ring; use 1 to %u letters, digits, '-', '_', '.'", CF_NAME_BYTES);
    if (info->lease_ns < 0 || info->lease_ns > CF_LONGEST_LEASE_NS)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "lease_ns is %lld but must be from 0 (default) to %lld; choose another",
                       (long long)info->lease_ns, (long long)CF_LONGEST_LEASE_NS);
    const bool grown = info->header.struct_size >= sizeof *info;
    if (grown && ((info->flags & ~CF_SESSION_DEVICE_MEMORY) != 0 || info->reserved != 0))
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "flags %x (reserved %u) of cf_session_info are unknown; give CF_SESSION_* and 0", info->flags,
                       info->reserved);
    cf_session* session = calloc(1, sizeof *session);
    if (session == NULL) return cf_fail(CF_ERROR_OUT_OF_MEMORY, "no memory for a session on ring %s", info->name);
    memcpy(session->name, info->name, strlen(info->name));
    session->lease_ns = info->lease_ns != 0 ? info->lease_ns : CF_DEFAULT_LEASE_NS;
    session->flags = grown ? info->flags : 0;
    session->self = cf_os_self();
    atomic_flag_clear(&session->following);
    cf_os_object object;
    cf_mapped_ring* ring = NULL;
    result = cf_os_open(session->name, &object);
    if (result == CF_SUCCESS) {
        result = attach(session, &object, &ring);
        cf_os_close(&object);
    }
    if (result < 0) {
        free(session);
        return result;
    }
    atomic_store(&session->current, ring);
    *out = session;
    return CF_SUCCESS;
}

cf_result cf_session_close(cf_session* session) {
    if (session == NULL) return CF_SUCCESS;
    const bool ours = cf_os_self().pid == session->self.pid; /* a forked child leaves its parent's lease alone */
    atomic_store(&session->held, NULL);                      /* freeing the lease clears the pin */
    for (cf_mapped_ring *ring = atomic_load(&session->retired), *older; ring != NULL; ring = older) {
        older = ring->older;
        unmap(ring, ours);
    }
    unmap(atomic_load(&session->current), ours);
    free(session);
    return CF_SUCCESS;
}

/* The writer's process lives, as far as this one can know. */
static bool writer_alive(const cf_session* session, const cf_mapped_ring* ring, int64_t silent_ns) {
    if (silent_ns < DOUBT_NS) return true;
    if (session->self.space != ring->layout.writer_space) return silent_ns < CF_LEASE_SILENCE_NS;
    return cf_os_alive(ring->layout.writer_pid, ring->layout.writer_start, UINT64_MAX);
}

cf_result cf_session_poll_state(cf_session* session, cf_session_state* state) {
    if (session == NULL) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the session is NULL; open one");
    const cf_result result = cf_check_struct(state, CF_STRUCT_SESSION_STATE, sizeof *state, "cf_session_state");
    if (result < 0) return result;
    cf_session_follow(session, cf_os_now_ns());
    const cf_mapped_ring* ring = cf_session_enter(session);
    const cf_ring_layout* layout = &ring->layout;
    const int64_t beat = atomic_load_explicit(&ring->header->heartbeat_ns, memory_order_acquire);
    const int64_t now = cf_os_now_ns(), silent = beat > now ? 0 : beat < 0 ? INT64_MAX : now - beat;
    const bool alive = writer_alive(session, ring, silent);
    uint32_t said = atomic_load_explicit(&ring->header->state, memory_order_acquire);
    if (said < CF_STATE_LOADING || said > CF_STATE_ENDED) said = CF_STATE_ERROR;
    if (!alive && said != CF_STATE_ENDED) said = CF_STATE_ERROR;
    if (said == CF_STATE_RUNNING && silent > layout->stall_ns) said = CF_STATE_STALLED;
    state->state = said;
    state->writer_alive = alive && said != CF_STATE_ENDED;
    state->generation = layout->generation;
    state->heartbeat_ns = beat;
    state->newest_id = atomic_load_explicit(&ring->header->latest, memory_order_relaxed) >> 8;
    state->format = layout->format;
    state->memory = layout->memory;
    state->width = layout->width;
    state->height = layout->height;
    state->fps_numerator = layout->fps_numerator;
    state->fps_denominator = layout->fps_denominator;
    state->slots = layout->slot_count;
    state->readers = layout->lease_count;
    cf_session_leave(session);
    return CF_SUCCESS;
}

cf_result cf_session_push(cf_session* session, const cf_event* event, uint64_t* event_id) {
    if (session == NULL) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the session is NULL; open one");
    cf_result result = cf_check_struct(event, CF_STRUCT_EVENT, sizeof *event, "cf_event");
    if (result == CF_SUCCESS) result = cf_queue_check(event);
    if (result < 0) return result;
    cf_session_follow(session, cf_os_now_ns());
    uint64_t id = 0;
    const cf_mapped_ring* ring = cf_session_enter(session);
    result = cf_queue_push(ring->queue, ring->layout.queue_count, ring->row, ring->owner, event, &id);
    cf_session_leave(session);
    count(result == CF_SUCCESS ? &session->stats.events_pushed : &session->stats.events_refused);
    if (result == CF_SUCCESS && event_id != NULL) *event_id = id;
    return result;
}

cf_result cf_stats_get(cf_session* session, cf_stats* out) {
    if (session == NULL) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the session is NULL; open one");
    const cf_result result = cf_check_struct(out, CF_STRUCT_STATS, sizeof *out, "cf_stats");
    if (result < 0) return result;
#define CF_COPY(field) out->field = atomic_load_explicit(&session->stats.field, memory_order_relaxed)
    CF_COPY(frames_new);
    CF_COPY(frames_repeated);
    CF_COPY(frames_skipped);
    CF_COPY(frames_late);
    CF_COPY(not_ready);
    CF_COPY(leases_lost);
    CF_COPY(events_pushed);
    CF_COPY(events_refused);
    CF_COPY(generations);
    CF_COPY(acquires);
    CF_COPY(acquire_last_ns);
    CF_COPY(acquire_longest_ns);
    CF_COPY(acquire_total_ns);
#undef CF_COPY
    return CF_SUCCESS;
}
