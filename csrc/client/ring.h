/* What lies in shared memory: the one description of the ring's layout, version 1.1.
 *
 * One object, little-endian, in two parts. The first is written by the writer alone; readers map it read-only, so that
 * a program cannot damage a frame by mistake. The second, the clients' part, is written by all.
 *
 *     writer's part    0              cf_ring_header    constants of the ring, then one cache line that changes
 *                      slots_offset   cf_ring_slot[]    what each slot holds
 *                      frames_offset  frames            slot_count times frame_bytes; none in a ring of device memory
 *     clients' part    leases_offset  cf_ring_lease[]   one a reader: which slot it pins, until when
 *                      queue_offset   cf_ring_queue     tail, then cf_ring_cell[queue_count]: control events
 *
 * Both parts begin at multiples of CF_RING_ALIGN, which every system can map at. Constants are complete before `magic`
 * is stored; a writer that restarts makes a new object under the same name and never touches the old one, so constants
 * never change. Whoever maps a ring still trusts none of it: constants are copied once and checked (cf_ring_check), and
 * only the copy is used; indices found later are checked where they are used.
 *
 * Why a pinned frame is never torn (a hazard pointer):
 *
 *     reader   P: lease.pin = (sequence, slot)      writer   B: slot.sequence = 0
 *              Q: read slot.sequence again                   L: read every lease.pin
 *
 * All four are seq_cst, so they have one total order. If P comes before L, the writer sees the pin and leaves the slot
 * alone. Else L comes before P, so B before Q, and the reader sees another sequence and lets go. A sequence returns
 * only where the writer took B back and wrote nothing: an equal value at Q means that the slot held this very frame all
 * the time. Pixels and descriptor are plain data beside that: written before slot.sequence is stored (release), read
 * after it was read (acquire), and read before the pin is cleared (release), which the writer reads (acquire) before it
 * writes again.
 *
 * A lease names the owner (pid and start time) and a deadline. The writer takes a pin back, by compare-and-swap, when
 * it wants that slot and the owner is dead or late; the owner's release is a compare-and-swap too, fails, and says so.
 * Every pin carries a count, so that two pins of one frame differ. Slots are leases + 2 at least: with every lease
 * pinning one and the newest frame left alone, one is free, and the writer never waits (choose_any).
 *
 * Device memory (1.1): `memory` says so, the frames lie device_stride apart in one allocation of the writer, and who
 * connects to handle_socket is sent a cf_ring_handle. The argument above holds: the writer publishes when its device
 * has written, a reader lets go when its own has read. A reader of 1.0 comes as far as `memory` and refuses the ring:
 * it finds a frames part of slot_count times nothing.
 */
#ifndef CF_RING_H
#define CF_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "cfengine_client.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the ring is little-endian and this machine is not"
#endif
_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_LLONG_LOCK_FREE == 2, "atomics between processes take no lock");
_Static_assert(sizeof(_Atomic uint64_t) == 8 && sizeof(_Atomic uint32_t) == 4, "atomics have the size of their value");

#define CF_RING_MAGIC UINT64_C(0x0031474e49524643) /* "CFRING1" and a zero */
#define CF_RING_MAJOR 1u
#define CF_RING_MINOR 1u /* newest that is known; a ring in host memory says 0, which has all that it needs */
#define CF_RING_ALIGN UINT64_C(65536) /* pages of every system, and where Windows can map */
#define CF_RING_MOST_LEASES 16u
#define CF_RING_MOST_SLOTS 250u
#define CF_RING_MOST_EVENTS 4096u
#define CF_RING_MOST_PIXELS 16384u /* width or height */

/* Constants of a ring. Offsets from here on are those in the object. */
typedef struct cf_ring_layout {
    uint32_t version_major, version_minor;
    uint64_t total_size;
    uint64_t generation; /* of this object; differs from that of every other writer */
    uint32_t header_size;
    uint32_t slot_count;
    uint32_t lease_count;
    uint32_t queue_count; /* a power of two */
    uint64_t slots_offset;
    uint64_t frames_offset;
    uint64_t frame_bytes; /* from one slot's frame to the next; 0 where frames are in device memory */
    uint64_t leases_offset;
    uint64_t queue_offset;
    uint32_t format;        /* CF_FORMAT_* */
    uint32_t memory;        /* CF_MEMORY_*; CF_MEMORY_HOST in version 1.0 */
    uint32_t width, height; /* pixels */
    uint32_t strides[2];    /* bytes a row, of each plane */
    uint64_t chroma_offset; /* of the second plane within a frame; 0 without one */
    uint32_t fps_numerator, fps_denominator;
    uint32_t writer_pid, reserved0;
    uint64_t writer_start;   /* start time of that process, so that its pid means nobody else */
    uint64_t writer_space;   /* in which pids count: the inode of the pid namespace, 0 where there are none */
    int64_t stall_ns;        /* RUNNING without a heartbeat for longer is STALLED */
    char handle_socket[108]; /* 1.1: path of the Unix socket that passes the handle of device memory; else empty */
    uint32_t reserved1;
    uint64_t device_stride; /* 1.1: from one slot's frame to the next in device memory; else 0 */
    uint32_t reserved2[10];
} cf_ring_layout;

typedef struct cf_ring_header {
    _Atomic uint64_t magic; /* stored last */
    cf_ring_layout layout;
    /* what changes, on a cache line of its own */
    _Atomic uint64_t latest; /* newest frame: sequence << 8 | slot; 0: none yet */
    _Atomic int64_t heartbeat_ns;
    _Atomic uint32_t state; /* CF_STATE_* */
    _Atomic uint32_t wake;  /* grows with every frame and change of state: the word of the futex */
    uint64_t reserved[21];
} cf_ring_header;

/* What a slot holds. Everything but `sequence` is good only while that is the one expected. */
typedef struct cf_ring_slot {
    _Atomic uint64_t sequence; /* id of the frame; 0: none, or being written */
    _Atomic int64_t pts_ns;
    _Atomic int64_t ready_ns;
    _Atomic uint64_t chunk_index;
    _Atomic uint64_t last_event_id;
    _Atomic uint64_t applied_at_chunk;
    _Atomic uint32_t flags; /* CF_FRAME_* */
    uint32_t reserved0;
    uint64_t fence_value;  /* reserved, for a writer that could give its readers a semaphore */
    uint64_t reserved1[8]; /* two cache lines: neighbours are not fetched in pairs */
} cf_ring_slot;

/* A reader's place. Owner and pin are words of their own, so that each changes in one step (lease.h packs them). */
typedef struct cf_ring_lease {
    _Atomic uint64_t owner;      /* 0: free */
    _Atomic uint64_t pin;        /* 0: none */
    _Atomic int64_t deadline_ns; /* until when the pin holds; stored before it */
    uint64_t reserved[5];
} cf_ring_lease;

typedef struct cf_ring_queue {
    _Atomic uint64_t tail; /* position of the next event */
    uint64_t reserved[7];
} cf_ring_queue;

/* An event. queue.c says how `state` is used. */
typedef struct cf_ring_cell {
    _Atomic uint64_t state;
    uint32_t kind;  /* CF_EVENT_* */
    uint32_t bytes; /* of text */
    int64_t pushed_ns;
    union {
        char text[CF_PROMPT_BYTES];
        struct {
            double value;
            uint32_t code;
        } action;
        struct {
            int64_t time_ns;
            float position[3], orientation[4];
        } pose;
    } as;
    uint8_t reserved[72];
} cf_ring_cell;

/* The one message of a connection to handle_socket, a packet (SOCK_SEQPACKET), sent as soon as the connection is
 * accepted; OPAQUE_FD comes with one file descriptor (SCM_RIGHTS). Nothing that a client sends is read. */
#define CF_RING_HANDLE_MAGIC UINT64_C(0x0031444e48524643) /* "CFRHND1" and a zero */
typedef struct cf_ring_handle {
    uint64_t magic;
    uint64_t generation;
    uint64_t size;          /* bytes of the allocation */
    uint64_t device_stride; /* this and the next two as in the layout */
    uint32_t slot_count;
    uint32_t memory;
    uint8_t device_uuid[16];
    uint8_t ipc_handle[64]; /* zeros where memory is OPAQUE_FD */
    uint64_t reserved;
} cf_ring_handle;
#define CF_RING_MOST_SLACK (UINT64_C(1) << 30) /* of an allocation behind its last slot; devices round up by less */

#define CF_AT(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)
CF_AT(cf_ring_header, layout, 8);
#define CF_LAYOUT_AT(field, offset) CF_AT(cf_ring_layout, field, (offset) - 8)
CF_LAYOUT_AT(version_major, 8);
CF_LAYOUT_AT(version_minor, 12);
CF_LAYOUT_AT(total_size, 16);
CF_LAYOUT_AT(generation, 24);
CF_LAYOUT_AT(header_size, 32);
CF_LAYOUT_AT(slot_count, 36);
CF_LAYOUT_AT(lease_count, 40);
CF_LAYOUT_AT(queue_count, 44);
CF_LAYOUT_AT(slots_offset, 48);
CF_LAYOUT_AT(frames_offset, 56);
CF_LAYOUT_AT(frame_bytes, 64);
CF_LAYOUT_AT(leases_offset, 72);
CF_LAYOUT_AT(queue_offset, 80);
CF_LAYOUT_AT(format, 88);
CF_LAYOUT_AT(memory, 92);
CF_LAYOUT_AT(width, 96);
CF_LAYOUT_AT(height, 100);
CF_LAYOUT_AT(strides, 104);
CF_LAYOUT_AT(chroma_offset, 112);
CF_LAYOUT_AT(fps_numerator, 120);
CF_LAYOUT_AT(fps_denominator, 124);
CF_LAYOUT_AT(writer_pid, 128);
CF_LAYOUT_AT(writer_start, 136);
CF_LAYOUT_AT(writer_space, 144);
CF_LAYOUT_AT(stall_ns, 152);
CF_LAYOUT_AT(handle_socket, 160);
CF_LAYOUT_AT(device_stride, 272);
_Static_assert(sizeof(cf_ring_layout) == 312, "cf_ring_layout");
CF_AT(cf_ring_header, latest, 320);
CF_AT(cf_ring_header, heartbeat_ns, 328);
CF_AT(cf_ring_header, state, 336);
CF_AT(cf_ring_header, wake, 340);
_Static_assert(sizeof(cf_ring_header) == 512, "cf_ring_header");
CF_AT(cf_ring_slot, pts_ns, 8);
CF_AT(cf_ring_slot, ready_ns, 16);
CF_AT(cf_ring_slot, chunk_index, 24);
CF_AT(cf_ring_slot, last_event_id, 32);
CF_AT(cf_ring_slot, applied_at_chunk, 40);
CF_AT(cf_ring_slot, flags, 48);
CF_AT(cf_ring_slot, fence_value, 56);
_Static_assert(sizeof(cf_ring_slot) == 128, "cf_ring_slot");
CF_AT(cf_ring_lease, pin, 8);
CF_AT(cf_ring_lease, deadline_ns, 16);
_Static_assert(sizeof(cf_ring_lease) == 64, "cf_ring_lease");
_Static_assert(sizeof(cf_ring_queue) == 64, "cf_ring_queue");
CF_AT(cf_ring_cell, kind, 8);
CF_AT(cf_ring_cell, bytes, 12);
CF_AT(cf_ring_cell, pushed_ns, 16);
CF_AT(cf_ring_cell, as, 24);
_Static_assert(offsetof(cf_ring_cell, as.action.code) == 32 && offsetof(cf_ring_cell, as.pose.position) == 32,
               "cell.as");
_Static_assert(offsetof(cf_ring_cell, as.pose.orientation) == 44, "cell.as.pose");
_Static_assert(sizeof(cf_ring_cell) == 4096, "cf_ring_cell");
CF_AT(cf_ring_handle, slot_count, 32);
CF_AT(cf_ring_handle, device_uuid, 40);
CF_AT(cf_ring_handle, ipc_handle, 56);
_Static_assert(sizeof(cf_ring_handle) == 128, "cf_ring_handle");

/* `latest`, in one word. */
static inline uint64_t cf_ring_latest(uint64_t sequence, uint32_t slot) { return sequence << 8 | slot; }

/* Fill every size and offset from format, memory, width, height and the counts. INVALID_ARGUMENT names the one that
 * cannot be. */
cf_result cf_ring_plan(const char* name, cf_ring_layout* layout);

/* Copy the constants of a mapped object out, once, and check them against its size before anything is used.
 * NOT_READY: no magic yet.   VERSION, BAD_RING: cf_last_error() names ring and field. */
cf_result cf_ring_check(const char* name, const cf_ring_header* header, uint64_t mapped_size, cf_ring_layout* layout);

/* Bytes from one slot's frame to the next, wherever the frames lie. */
static inline uint64_t cf_ring_frame_stride(const cf_ring_layout* layout) {
    return layout->memory == CF_MEMORY_HOST ? layout->frame_bytes : layout->device_stride;
}

#endif
