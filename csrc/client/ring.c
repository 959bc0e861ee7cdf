/* Sizes and offsets of a ring: planned by the writer, checked by whoever maps one. */
#include "ring.h"

#include <stdbool.h>
#include <string.h>

#include "error.h"

static uint64_t up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

static cf_result refuse(const char* name, const char* field, uint64_t value, uint64_t low, uint64_t high) {
    return cf_fail(CF_ERROR_INVALID_ARGUMENT, "ring %s: %s is %llu but must be from %llu to %llu; choose another", name,
                   field, (unsigned long long)value, (unsigned long long)low, (unsigned long long)high);
}

cf_result cf_ring_plan(const char* name, cf_ring_layout* ring) {
    const bool nv12 = ring->format == CF_FORMAT_NV12;
    if (!nv12 && ring->format != CF_FORMAT_RGBA8)
        return refuse(name, "format", ring->format, CF_FORMAT_RGBA8, CF_FORMAT_NV12);
    if (ring->memory < CF_MEMORY_HOST || ring->memory > CF_MEMORY_OPAQUE_FD)
        return refuse(name, "memory", ring->memory, CF_MEMORY_HOST, CF_MEMORY_OPAQUE_FD);
    if (ring->width < 1 || ring->width > CF_RING_MOST_PIXELS)
        return refuse(name, "width", ring->width, 1, CF_RING_MOST_PIXELS);
    if (ring->height < 1 || ring->height > CF_RING_MOST_PIXELS)
        return refuse(name, "height", ring->height, 1, CF_RING_MOST_PIXELS);
    if (nv12 && (ring->width % 2 || ring->height % 2))
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "ring %s: frames of %u x %u cannot be NV12; width and height must be even", name, ring->width,
                       ring->height);
    if (ring->lease_count < 1 || ring->lease_count > CF_RING_MOST_LEASES)
        return refuse(name, "readers", ring->lease_count, 1, CF_RING_MOST_LEASES);
    if (ring->slot_count < ring->lease_count + 2 || ring->slot_count > CF_RING_MOST_SLOTS)
        return refuse(name, "slots", ring->slot_count, ring->lease_count + 2, CF_RING_MOST_SLOTS);
    if (ring->queue_count < 2 || ring->queue_count > CF_RING_MOST_EVENTS || ring->queue_count & (ring->queue_count - 1))
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "ring %s: room for %u events; choose a power of two from 2 to %u",
                       name, ring->queue_count, CF_RING_MOST_EVENTS);
    if (ring->fps_numerator < 1 || ring->fps_denominator < 1)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "ring %s: %u/%u frames a second; both numbers must be positive", name,
                       ring->fps_numerator, ring->fps_denominator);
    ring->version_major = CF_RING_MAJOR;
    ring->version_minor = ring->memory == CF_MEMORY_HOST ? 0 : CF_RING_MINOR;
    ring->header_size = sizeof(cf_ring_header);
    ring->strides[0] = (uint32_t)up((uint64_t)ring->width * (nv12 ? 1 : 4), 64); /* rows begin on cache lines */
    ring->strides[1] = nv12 ? ring->strides[0] : 0;
    const uint64_t first = (uint64_t)ring->strides[0] * ring->height;
    ring->chroma_offset = nv12 ? first : 0;
    const uint64_t frame = up(nv12 ? first + (uint64_t)ring->strides[1] * (ring->height / 2) : first, 4096);
    ring->frame_bytes = ring->memory == CF_MEMORY_HOST ? frame : 0;
    ring->device_stride = ring->memory == CF_MEMORY_HOST ? 0 : frame;
    ring->slots_offset = ring->header_size;
    ring->frames_offset = up(ring->slots_offset + ring->slot_count * sizeof(cf_ring_slot), CF_RING_ALIGN);
    ring->leases_offset = up(ring->frames_offset + ring->slot_count * ring->frame_bytes, CF_RING_ALIGN);
    ring->queue_offset = ring->leases_offset + ring->lease_count * sizeof(cf_ring_lease);
    ring->total_size =
        up(ring->queue_offset + sizeof(cf_ring_queue) + ring->queue_count * sizeof(cf_ring_cell), CF_RING_ALIGN);
    return CF_SUCCESS;
}

/* `count` things of `each` bytes lie at `offset` between `from` and `to`; no sum or product that could overflow. */
static bool lies(uint64_t offset, uint64_t count, uint64_t each, uint64_t from, uint64_t to) {
    return offset >= from && offset <= to && (count == 0 || each <= (to - offset) / count);
}

/* What frames in device memory need besides. */
static const char* wrong_device_field(const cf_ring_layout* ring) {
    if (ring->memory != CF_MEMORY_CUDA_IPC && ring->memory != CF_MEMORY_OPAQUE_FD) return "memory";
    if (ring->version_minor < 1) return "version_minor";
    if (ring->frame_bytes != 0) return "frame_bytes";
    if (ring->device_stride % 64 || ring->device_stride > (uint64_t)PTRDIFF_MAX / CF_RING_MOST_SLOTS)
        return "device_stride";
    if (ring->handle_socket[0] != '/' || memchr(ring->handle_socket, 0, sizeof ring->handle_socket) == NULL)
        return "handle_socket";
    return NULL;
}

/* Name of the first field that cannot be, or NULL. Every bound is a constant or was checked above its use. */
static const char* wrong_field(const cf_ring_layout* ring, uint64_t mapped) {
    const uint64_t end = ring->total_size, shared = ring->leases_offset;
    const bool nv12 = ring->format == CF_FORMAT_NV12;
    if (end > mapped || end > (uint64_t)PTRDIFF_MAX) return "total_size";
    if (ring->header_size < sizeof(cf_ring_header) || ring->header_size > CF_RING_ALIGN) return "header_size";
    if (ring->lease_count < 1 || ring->lease_count > CF_RING_MOST_LEASES) return "lease_count";
    if (ring->slot_count < ring->lease_count + 2 || ring->slot_count > CF_RING_MOST_SLOTS) return "slot_count";
    const uint32_t events = ring->queue_count;
    if (events < 2 || events > CF_RING_MOST_EVENTS || events & (events - 1)) return "queue_count";
    if (shared % CF_RING_ALIGN || shared > end) return "leases_offset";
    if (ring->slots_offset % 64 ||
        !lies(ring->slots_offset, ring->slot_count, sizeof(cf_ring_slot), ring->header_size, shared))
        return "slots_offset";
    if (ring->frames_offset % CF_RING_ALIGN || ring->frames_offset > shared) return "frames_offset";
    if (ring->slots_offset + ring->slot_count * sizeof(cf_ring_slot) > ring->frames_offset) return "frames_offset";
    if (ring->frame_bytes % 64 || !lies(ring->frames_offset, ring->slot_count, ring->frame_bytes, 0, shared))
        return "frame_bytes";
    if (!lies(shared, ring->lease_count, sizeof(cf_ring_lease), shared, end)) return "leases_offset";
    const uint64_t leases_end = shared + ring->lease_count * sizeof(cf_ring_lease);
    const uint64_t queue_bytes = sizeof(cf_ring_queue) + events * sizeof(cf_ring_cell);
    if (ring->queue_offset % 64 || !lies(ring->queue_offset, 1, queue_bytes, leases_end, end)) return "queue_offset";
    const char* field = ring->memory == CF_MEMORY_HOST ? NULL : wrong_device_field(ring);
    if (field != NULL) return field;
    const uint64_t frame = cf_ring_frame_stride(ring);
    if (!nv12 && ring->format != CF_FORMAT_RGBA8) return "format";
    if (ring->width < 1 || ring->width > CF_RING_MOST_PIXELS || (nv12 && ring->width % 2)) return "width";
    if (ring->height < 1 || ring->height > CF_RING_MOST_PIXELS || (nv12 && ring->height % 2)) return "height";
    if (ring->strides[0] < ring->width * (nv12 ? 1 : 4)) return "stride";
    if (!lies(0, ring->height, ring->strides[0], 0, frame)) return "stride";
    if (nv12 && ring->strides[1] < ring->width) return "chroma stride";
    const uint64_t luma = (uint64_t)ring->height * ring->strides[0];
    if (nv12 && !lies(ring->chroma_offset, ring->height / 2, ring->strides[1], luma, frame)) return "chroma_offset";
    if (ring->fps_numerator < 1 || ring->fps_denominator < 1) return "fps";
    return NULL;
}

cf_result cf_ring_check(const char* name, const cf_ring_header* header, uint64_t mapped_size, cf_ring_layout* layout) {
    if (mapped_size < sizeof *header)
        return cf_fail(CF_ERROR_BAD_RING, "ring %s: %llu bytes cannot hold a header of %llu; start its writer again",
                       name, (unsigned long long)mapped_size, (unsigned long long)sizeof *header);
    const uint64_t magic = atomic_load_explicit(&header->magic, memory_order_acquire);
    if (magic == 0) return CF_NOT_READY;
    if (magic != CF_RING_MAGIC)
        return cf_fail(CF_ERROR_BAD_RING, "ring %s begins with %016llx but must with %016llx; give a ring of cfengine",
                       name, (unsigned long long)magic, (unsigned long long)CF_RING_MAGIC);
    /* word by word through atomic loads: the compiler may not read shared memory a second time behind the checks */
    uint64_t words[sizeof *layout / 8];
    const _Atomic uint64_t* from = (const _Atomic uint64_t*)(const void*)&header->layout;
    for (size_t i = 0; i < sizeof *layout / 8; ++i) words[i] = atomic_load_explicit(from + i, memory_order_relaxed);
    memcpy(layout, words, sizeof words);
    if (layout->version_major != CF_RING_MAJOR)
        return cf_fail(CF_ERROR_VERSION,
                       "ring %s has layout %u.%u but this library reads %u.x; use the client of its writer", name,
                       layout->version_major, layout->version_minor, CF_RING_MAJOR);
    const char* field = wrong_field(layout, mapped_size);
    if (field != NULL)
        return cf_fail(CF_ERROR_BAD_RING,
                       "ring %s: %s is out of range in an object of %llu bytes; start its writer again", name, field,
                       (unsigned long long)mapped_size);
    return CF_SUCCESS;
}
