/* Names: who writes a ring, and taking the name from the dead. */
#include "evict.h"

#include "error.h"
#include "lease.h"
#include "os.h"
#include "ring.h"
#include "writer.h"

#define UNFINISHED_NS 2000000000 /* without its magic for longer, a ring was left by a writer that died */

/* A living process writes the object. */
static bool occupied(const char* name, const cf_os_object* object) {
    void* memory = NULL;
    cf_ring_layout layout;
    if (object->size < sizeof(cf_ring_header)) return object->age_ns < UNFINISHED_NS;
    if (cf_os_map(object, 0, sizeof(cf_ring_header), false, &memory) < 0) return true;
    const cf_ring_header* header = memory;
    const cf_result result = cf_ring_check(name, header, object->size, &layout);
    bool alive = result == CF_NOT_READY && object->age_ns < UNFINISHED_NS;
    if (result == CF_SUCCESS) {
        const bool ended = atomic_load_explicit(&header->state, memory_order_acquire) == CF_STATE_ENDED;
        const bool judged = layout.writer_space == cf_os_self().space;
        alive = !ended && (judged ? cf_os_alive(layout.writer_pid, layout.writer_start, UINT64_MAX)
                                  : atomic_load(&header->heartbeat_ns) > cf_os_now_ns() - CF_LEASE_SILENCE_NS);
    }
    cf_os_unmap(memory, sizeof(cf_ring_header));
    return alive;
}

cf_result cf_evict(const char* name) {
    cf_os_object old;
    const cf_result result = cf_os_open(name, &old);
    if (result == CF_ERROR_NOT_FOUND) return CF_SUCCESS;
    if (result < 0) return result;
    const bool busy = occupied(name, &old);
    if (!busy) cf_os_remove(name, &old);
    cf_os_close(&old);
    if (busy) return cf_fail(CF_ERROR_BUSY, "ring %s has a living writer; end it, or choose another name", name);
    return CF_SUCCESS;
}

cf_result cf_writer_unlink(const char* name) {
    cf_os_object old;
    if (!cf_is_name(name)) return cf_fail(CF_ERROR_INVALID_ARGUMENT, "that is no name of a ring");
    const cf_result result = cf_os_open(name, &old);
    if (result < 0) return result;
    cf_os_close(&old);
    return cf_evict(name);
}
