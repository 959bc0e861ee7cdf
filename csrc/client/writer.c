/* Making a ring, choosing slots, publishing. */
#include "writer.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "evict.h"
#include "lease.h"
#include "os.h"
#include "queue.h"
#include "ring.h"

#define NO_SLOT CF_RING_MOST_SLOTS

struct cf_writer {
    char name[CF_NAME_BYTES + 1];
    cf_os_object object;
    cf_ring_layout layout; /* what counts: the copy in shared memory is for readers */
    void* memory;
    cf_ring_header* header;
    cf_ring_slot* slots;
    uint8_t* frames; /* NULL where they are in device memory */
    cf_ring_lease* leases;
    cf_ring_queue* queue;
    uint64_t sequences[CF_RING_MOST_SLOTS]; /* what each slot holds */
    uint64_t newest;                        /* its sequence; 0: none */
    uint32_t newest_slot, open_slot;        /* NO_SLOT: none */
    cf_queue_reader events;
    cf_taken_event event;
    _Atomic uint64_t published, revoked, refused;
};

static cf_result create_object(cf_writer* writer) {
    cf_result result = CF_ERROR_BUSY;
    for (int tries = 0; tries < 4; ++tries) { /* others may replace the same ring */
        result = cf_os_create(writer->name, writer->layout.total_size, &writer->object);
        if (result != CF_ERROR_BUSY) break;
        const cf_result evicted = cf_evict(writer->name);
        if (evicted < 0) return evicted;
    }
    if (result < 0) return result;
    result = cf_os_map(&writer->object, 0, writer->layout.total_size, true, &writer->memory);
    if (result < 0) cf_os_remove(writer->name, &writer->object);
    return result;
}

/* Fill a new object; the magic comes last. */
static void lay_out(cf_writer* writer) {
    uint8_t* memory = writer->memory;
    const cf_ring_layout* layout = &writer->layout;
    writer->header = writer->memory;
    writer->slots = (cf_ring_slot*)(memory + layout->slots_offset);
    writer->frames = layout->memory == CF_MEMORY_HOST ? memory + layout->frames_offset : NULL;
    writer->leases = (cf_ring_lease*)(memory + layout->leases_offset);
    writer->queue = (cf_ring_queue*)(memory + layout->queue_offset);
    writer->header->layout = *layout;
    cf_queue_prepare(writer->queue, layout->queue_count);
    atomic_store(&writer->header->state, CF_STATE_LOADING);
    cf_writer_beat(writer);
    atomic_store_explicit(&writer->header->magic, CF_RING_MAGIC, memory_order_release);
}

/* Constants of the ring that is asked for. */
static cf_result plan(const cf_writer_info* info, cf_ring_layout* layout) {
    if (!cf_is_name(info->name))
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "that is no name of a ring; use 1 to %u letters, digits, '-', '_', '.'", CF_NAME_BYTES);
    if (info->stall_ns < 1)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "ring %s: stall_ns is %lld but must be positive", info->name,
                       (long long)info->stall_ns);
    const cf_os_process self = cf_os_self();
    *layout = (cf_ring_layout){
        .generation = cf_os_time_ns(), /* no other writer of this name had it */
        .slot_count = info->slots,
        .lease_count = info->readers,
        .queue_count = info->events,
        .format = info->format,
        .memory = info->memory,
        .width = info->width,
        .height = info->height,
        .fps_numerator = info->fps_numerator,
        .fps_denominator = info->fps_denominator,
        .writer_pid = self.pid,
        .writer_start = self.start,
        .writer_space = self.space,
        .stall_ns = info->stall_ns,
    };
    return cf_ring_plan(info->name, layout);
}

cf_result cf_writer_frame_stride(const cf_writer_info* info, uint64_t* bytes) {
    cf_ring_layout layout;
    const cf_result result = plan(info, &layout);
    if (result == CF_SUCCESS) *bytes = cf_ring_frame_stride(&layout);
    return result;
}

static cf_result name_socket(const cf_writer_info* info, cf_ring_layout* layout) {
    const char* path = info->handle_socket;
    if (info->memory == CF_MEMORY_HOST) return CF_SUCCESS;
    const size_t length = path == NULL ? 0 : strlen(path);
    if (length == 0 || length >= sizeof layout->handle_socket || path[0] != '/')
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "ring %s: the path of its socket has %llu bytes; give an absolute one of at most %llu",
                       info->name, (unsigned long long)length, (unsigned long long)sizeof layout->handle_socket - 1);
    memcpy(layout->handle_socket, path, length);
    return CF_SUCCESS;
}

cf_result cf_writer_create(const cf_writer_info* info, cf_writer** out) {
    if (info == NULL || out == NULL) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "cf_writer_create was given a NULL");
    *out = NULL;
    cf_ring_layout layout;
    cf_result result = plan(info, &layout);
    if (result == CF_SUCCESS) result = name_socket(info, &layout);
    if (result < 0) return result;
    cf_writer* writer = calloc(1, sizeof *writer);
    if (writer == NULL) return cf_fail(CF_ERROR_OUT_OF_MEMORY, "no memory for the writer of ring %s", info->name);
    memcpy(writer->name, info->name, strlen(info->name));
    writer->object.handle = -1;
    writer->newest_slot = writer->open_slot = NO_SLOT;
    writer->layout = layout;
    result = create_object(writer);
    if (result < 0) {
        cf_os_close(&writer->object);
        free(writer);
        return result;
    }
    lay_out(writer);
    *out = writer;
    return CF_SUCCESS;
}

/* Oldest slot but the newest, of those not tried. */
static uint32_t oldest(const cf_writer* writer, const bool* tried) {
    uint32_t best = NO_SLOT;
    for (uint32_t i = 0; i < writer->layout.slot_count; ++i)
        if (i != writer->newest_slot && !tried[i] &&
            (best == NO_SLOT || writer->sequences[i] < writer->sequences[best]))
            best = i;
    return best;
}

/* Somebody who counts reads this slot. */
static bool blocked(cf_writer* writer, uint32_t slot, int64_t now) {
    uint64_t revoked = 0;
    const bool result = cf_lease_blocks(writer->leases, writer->layout.lease_count, slot, now, &revoked);
    atomic_fetch_add_explicit(&writer->revoked, revoked, memory_order_relaxed);
    return result;
}

static void announce(cf_writer* writer, uint32_t slot) {
    atomic_store_explicit(&writer->slots[slot].sequence, 0, memory_order_seq_cst); /* B in ring.h */
}

static void withdraw(cf_writer* writer, uint32_t slot) {
    atomic_store_explicit(&writer->slots[slot].sequence, writer->sequences[slot], memory_order_release);
}

/* The oldest slot that nobody reads, announced; NO_SLOT where each was pinned when it was asked for. */
static uint32_t choose_oldest(cf_writer* writer, int64_t now) {
    bool tried[CF_RING_MOST_SLOTS] = {false};
    uint32_t slot;
    while ((slot = oldest(writer, tried)) != NO_SLOT) {
        tried[slot] = true;
        /* asked before it is announced too, so that readers are not sent away from a slot that stays as it is */
        if (blocked(writer, slot, now)) continue;
        announce(writer, slot);
        if (!blocked(writer, slot, now)) return slot;
        withdraw(writer, slot); /* a reader was quicker */
    }
    return NO_SLOT;
}

/* The same for readers that went from slot to slot just ahead of the writer. With every slot but the newest announced,
 * a reader can begin no pin any more, so each blocks one slot at most, and there are more slots than readers. */
static uint32_t choose_any(cf_writer* writer, int64_t now) {
    bool tried[CF_RING_MOST_SLOTS] = {false};
    uint32_t slot;
    for (uint32_t i = 0; i < writer->layout.slot_count; ++i)
        if (i != writer->newest_slot) announce(writer, i);
    while ((slot = oldest(writer, tried)) != NO_SLOT && blocked(writer, slot, now)) tried[slot] = true;
    for (uint32_t i = 0; i < writer->layout.slot_count; ++i)
        if (i != writer->newest_slot && i != slot) withdraw(writer, i);
    return slot;
}

cf_result cf_writer_begin(cf_writer* writer, cf_writable* out) {
    if (writer->open_slot != NO_SLOT)
        return cf_fail(CF_ERROR_BUSY, "ring %s: a frame is being written; commit it before the next begin",
                       writer->name);
    const int64_t now = cf_os_now_ns();
    uint32_t slot = choose_oldest(writer, now);
    if (slot == NO_SLOT) slot = choose_any(writer, now);
    if (slot == NO_SLOT) {
        atomic_fetch_add_explicit(&writer->refused, 1, memory_order_relaxed);
        return cf_fail(CF_ERROR_BUSY, "ring %s: all %u slots are pinned by %u readers; the frame is dropped",
                       writer->name, writer->layout.slot_count, writer->layout.lease_count);
    }
    const bool host = writer->frames != NULL, two = writer->layout.format == CF_FORMAT_NV12;
    const uint64_t at = slot * cf_ring_frame_stride(&writer->layout), chroma = at + writer->layout.chroma_offset;
    writer->sequences[slot] = 0;
    writer->open_slot = slot;
    out->id = writer->newest + 1;
    out->planes[0] = host ? writer->frames + at : NULL;
    out->planes[1] = host && two ? writer->frames + chroma : NULL;
    out->offsets[0] = host ? 0 : at;
    out->offsets[1] = host || !two ? 0 : chroma;
    out->strides[0] = writer->layout.strides[0];
    out->strides[1] = writer->layout.strides[1];
    return CF_SUCCESS;
}

void cf_writer_cancel(cf_writer* writer) { writer->open_slot = NO_SLOT; }

static void wake(cf_writer* writer) {
    atomic_fetch_add_explicit(&writer->header->wake, 1, memory_order_release);
    cf_os_wake(&writer->header->wake);
}

cf_result cf_writer_commit(cf_writer* writer, const cf_publish_info* info) {
    if (writer->open_slot == NO_SLOT)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "ring %s: commit without begin", writer->name);
    const uint32_t index = writer->open_slot;
    const uint64_t sequence = writer->newest + 1;
    const int64_t ready = cf_os_now_ns(), pts = info->pts_ns != 0 ? info->pts_ns : ready;
    const uint32_t flags =
        (info->flags & (CF_FRAME_REPEATED | CF_FRAME_DISCONTINUITY)) | (ready > pts ? CF_FRAME_LATE : 0);
    cf_ring_slot* slot = &writer->slots[index];
    atomic_store_explicit(&slot->pts_ns, pts, memory_order_relaxed);
    atomic_store_explicit(&slot->ready_ns, ready, memory_order_relaxed);
    atomic_store_explicit(&slot->chunk_index, info->chunk_index, memory_order_relaxed);
    atomic_store_explicit(&slot->last_event_id, info->last_event_id, memory_order_relaxed);
    atomic_store_explicit(&slot->applied_at_chunk, info->applied_at_chunk, memory_order_relaxed);
    atomic_store_explicit(&slot->flags, flags, memory_order_relaxed);
    atomic_store_explicit(&slot->sequence, sequence, memory_order_release);
    atomic_store_explicit(&writer->header->latest, cf_ring_latest(sequence, index), memory_order_release);
    atomic_store_explicit(&writer->header->heartbeat_ns, ready, memory_order_release);
    writer->sequences[index] = writer->newest = sequence;
    writer->newest_slot = index;
    writer->open_slot = NO_SLOT;
    atomic_store_explicit(&writer->published, sequence, memory_order_relaxed);
    wake(writer);
    return CF_SUCCESS;
}

cf_result cf_writer_publish(cf_writer* writer, cf_pixels pixels, const cf_publish_info* info, uint64_t* id) {
    const cf_ring_layout* ring = &writer->layout;
    if (pixels.width != ring->width || pixels.height != ring->height)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "a frame of %u x %u, but ring %s has %u x %u; make a ring of the frame's size", pixels.width,
                       pixels.height, writer->name, ring->width, ring->height);
    if (ring->memory != CF_MEMORY_HOST)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the frames of ring %s are in device memory, and this one is not",
                       writer->name);
    if (pixels.channels != 3 && pixels.channels != 4)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "a frame of %u channels; give RGB (3) or RGBA (4)", pixels.channels);
    cf_writable slot;
    const cf_result result = cf_writer_begin(writer, &slot);
    if (result < 0) return result;
    if (ring->format == CF_FORMAT_NV12)
        cf_convert_nv12(pixels, slot.planes[0], slot.strides[0], slot.planes[1], slot.strides[1]);
    else
        cf_convert_rgba8(pixels, slot.planes[0], slot.strides[0]);
    if (id != NULL) *id = slot.id;
    return cf_writer_commit(writer, info);
}

cf_result cf_writer_take_event(cf_writer* writer, cf_writer_event* event) {
    cf_taken_event* taken = &writer->event;
    const cf_result result = cf_queue_take(&writer->events, writer->queue, writer->layout.queue_count, writer->leases,
                                           writer->layout.lease_count, taken);
    if (result != CF_SUCCESS) return result;
    *event = (cf_writer_event){taken->id,   taken->pushed_ns, taken->kind, taken->bytes,
                               taken->text, taken->action,    taken->pose};
    return CF_SUCCESS;
}

cf_result cf_writer_set_state(cf_writer* writer, uint32_t state) {
    if (state < CF_STATE_LOADING || state > CF_STATE_ENDED)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "ring %s: state %u is unknown; choose %u to %u", writer->name, state,
                       CF_STATE_LOADING, CF_STATE_ENDED);
    atomic_store_explicit(&writer->header->state, state, memory_order_release);
    cf_writer_beat(writer);
    wake(writer);
    return CF_SUCCESS;
}

void cf_writer_beat(cf_writer* writer) {
    atomic_store_explicit(&writer->header->heartbeat_ns, cf_os_now_ns(), memory_order_release);
}

uint32_t cf_writer_state(const cf_writer* writer) {
    return atomic_load_explicit(&writer->header->state, memory_order_relaxed);
}

uint64_t cf_writer_generation(const cf_writer* writer) { return writer->layout.generation; }

void cf_writer_stats_get(const cf_writer* writer, cf_writer_stats* stats) {
    *stats = (cf_writer_stats){atomic_load(&writer->published), atomic_load(&writer->revoked),
                               atomic_load(&writer->refused), atomic_load(&writer->events.dropped), 0};
    for (uint32_t i = 0; i < writer->layout.lease_count; ++i)
        stats->readers += (atomic_load(&writer->leases[i].owner) & CF_LEASE_TAKEN) != 0;
}

void cf_writer_close(cf_writer* writer) {
    if (writer == NULL) return;
    if (cf_os_self().pid == writer->layout.writer_pid) { /* not the copy of a child that was forked */
        cf_writer_set_state(writer, CF_STATE_ENDED);
        cf_os_remove(writer->name, &writer->object);
    }
    cf_os_unmap(writer->memory, writer->layout.total_size);
    cf_os_close(&writer->object);
    free(writer);
}
