/* Device memory: the writer's handle of it, asked for and checked. What a program imports is its own affair. */
#include <string.h>

#include "error.h"
#include "session.h"

#define ANSWER_NS 1000000000 /* a writer that takes longer to accept a connection has stopped */

/* What a program is told of the memory is what the ring's own constants say; only size, device and handle are new. */
static cf_result check_handle(const char* name, const cf_ring_layout* ring, const cf_ring_handle* handle, size_t bytes,
                              int fd) {
    const uint64_t needed = ring->slot_count * ring->device_stride;
    const char* field = NULL;
    if (bytes < sizeof *handle)
        return cf_fail(CF_ERROR_BAD_RING, "ring %s: its socket gave %llu bytes of %llu; start its writer again", name,
                       (unsigned long long)bytes, (unsigned long long)sizeof *handle);
    if (handle->magic != CF_RING_HANDLE_MAGIC)
        field = "magic";
    else if (handle->generation != ring->generation)
        field = "generation";
    else if (handle->memory != ring->memory)
        field = "memory";
    else if (handle->slot_count != ring->slot_count)
        field = "slot_count";
    else if (handle->device_stride != ring->device_stride)
        field = "device_stride";
    else if (handle->size < needed || handle->size - needed >= CF_RING_MOST_SLACK)
        field = "size";
    else if ((fd >= 0) != (ring->memory == CF_MEMORY_OPAQUE_FD))
        field = "descriptor";
    if (field == NULL) return CF_SUCCESS;
    return cf_fail(CF_ERROR_BAD_RING,
                   "ring %s: the %s of the handle from its socket does not fit the ring; start its "
                   "writer again",
                   name, field);
}

/* Constants of the ring that is asked about, copied while it cannot be unmapped. */
static cf_ring_layout layout_of(cf_session* session) {
    const cf_mapped_ring* held = atomic_load(&session->held);
    if (held != NULL) return held->layout;
    cf_session_follow(session, cf_os_now_ns());
    const cf_ring_layout layout = cf_session_enter(session)->layout;
    cf_session_leave(session);
    return layout;
}

cf_result cf_session_device_memory(cf_session* session, cf_device_memory* memory) {
    cf_result result = cf_check_struct(memory, CF_STRUCT_DEVICE_MEMORY, sizeof *memory, "cf_device_memory");
    if (result < 0) return result;
    memory->fd = -1;
    if (session == NULL) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the session is NULL; open one");
    const cf_ring_layout ring = layout_of(session);
    if (ring.memory == CF_MEMORY_HOST)
        return cf_fail(CF_ERROR_MEMORY_KIND, "the frames of ring %s are in host memory; read planes[].data",
                       session->name);
    cf_ring_handle handle;
    size_t bytes = 0;
    int fd = -1;
    result = cf_os_receive(session->name, ring.handle_socket, cf_os_now_ns() + ANSWER_NS, &handle, sizeof handle,
                           &bytes, &fd);
    if (result == CF_SUCCESS) result = check_handle(session->name, &ring, &handle, bytes, fd);
    if (result < 0) {
        cf_os_close_fd(fd);
        return result;
    }
    memory->generation = ring.generation;
    memory->size = handle.size;
    memory->frame_stride = ring.device_stride;
    memory->slots = ring.slot_count;
    memory->memory = ring.memory;
    memory->fd = fd;
    memory->reserved = 0;
    memcpy(memory->device_uuid, handle.device_uuid, sizeof memory->device_uuid);
    memcpy(memory->ipc_handle, handle.ipc_handle, sizeof memory->ipc_handle);
    return CF_SUCCESS;
}
