/* A bounded queue of many producers and one consumer, after Dmitry Vyukov's: every cell says which position it is for.
 *
 * state: position << 24 | epoch << 16 | lease row << 8 | phase. A producer
 *
 *     1. claims the cell of `tail`, if it is FREE for that position: compare-and-swap to CLAIMED, with its lease;
 *     2. moves tail on by one, which anybody may do who finds the cell claimed;
 *     3. writes the event and changes CLAIMED into READY (release).
 *
 * The consumer copies a READY event out and stores FREE for the position one lap later. Vyukov's producers move the
 * tail first, and one that dies before it has written stops the queue for good. Here the claim itself names its owner,
 * in the same step, so the consumer can ask whether that process lives: a cell of the dead is freed, and one of a
 * process that merely sleeps is passed by until it is written. Nothing is judged by time (but for readers of another
 * pid namespace, see lease.h), so a cell is never written by two.
 */
#include "queue.h"

#include <math.h>
#include <string.h>

#include "error.h"

enum { FREE = 0, CLAIMED = 1, READY = 2 };

static uint64_t pack(uint64_t position, uint8_t epoch, uint32_t row, uint32_t phase) {
    return position << 24 | (uint64_t)epoch << 16 | (uint64_t)(uint8_t)row << 8 | phase;
}

static cf_ring_cell* cell_of(cf_ring_queue* queue, uint32_t count, uint64_t position) {
    return (cf_ring_cell*)(queue + 1) + (position & (count - 1));
}

void cf_queue_prepare(cf_ring_queue* queue, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i)
        atomic_store_explicit(&cell_of(queue, count, i)->state, pack(i, 0, 0, FREE), memory_order_relaxed);
}

static bool finite_pose(const cf_pose* pose) {
    for (int i = 0; i < 3; ++i)
        if (!isfinite(pose->position[i])) return false;
    for (int i = 0; i < 4; ++i)
        if (!isfinite(pose->orientation[i])) return false;
    return true;
}

cf_result cf_queue_check(const cf_event* event) {
    switch (event->kind) {
        case CF_EVENT_PROMPT:
            if (event->as.prompt.bytes > CF_PROMPT_BYTES)
                return cf_fail(CF_ERROR_TOO_LONG, "a prompt of %u bytes, but a ring takes %u; shorten it",
                               event->as.prompt.bytes, CF_PROMPT_BYTES);
            if (event->as.prompt.utf8 == NULL || event->as.prompt.bytes == 0)
                return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the prompt is empty; give it text");
            if (!cf_is_utf8(event->as.prompt.utf8, event->as.prompt.bytes))
                return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the prompt is not UTF-8, or holds a zero; convert it first");
            return CF_SUCCESS;
        case CF_EVENT_ACTION:
            if (!isfinite(event->as.action.value))
                return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the value of action %u is not finite",
                               event->as.action.code);
            return CF_SUCCESS;
        case CF_EVENT_POSE:
            if (!finite_pose(&event->as.pose))
                return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the pose holds a number that is not finite");
            return CF_SUCCESS;
        case CF_EVENT_PAUSE:
        case CF_EVENT_RESUME:
        case CF_EVENT_RESET:
            return CF_SUCCESS;
        default:
            return cf_fail(CF_ERROR_INVALID_ARGUMENT, "event kind %u is unknown; choose %u to %u", event->kind,
                           CF_EVENT_PROMPT, CF_EVENT_RESET);
    }
}

static void write_cell(cf_ring_cell* cell, const cf_event* event) {
    cell->kind = event->kind;
    cell->bytes = 0;
    cell->pushed_ns = cf_os_now_ns();
    if (event->kind == CF_EVENT_PROMPT) {
        cell->bytes = event->as.prompt.bytes;
        memcpy(cell->as.text, event->as.prompt.utf8, event->as.prompt.bytes);
    } else if (event->kind == CF_EVENT_ACTION) {
        cell->as.action.value = event->as.action.value;
        cell->as.action.code = event->as.action.code;
    } else if (event->kind == CF_EVENT_POSE) {
        cell->as.pose.time_ns = event->as.pose.time_ns;
        memcpy(cell->as.pose.position, event->as.pose.position, sizeof event->as.pose.position);
        memcpy(cell->as.pose.orientation, event->as.pose.orientation, sizeof event->as.pose.orientation);
    }
}

cf_result cf_queue_push(cf_ring_queue* queue, uint32_t count, uint32_t row, uint64_t owner, const cf_event* event,
                        uint64_t* id) {
    /* each failed round means that another producer went on; the bound is for a queue that somebody has damaged */
    for (uint32_t tries = 0; tries < 4 * count + 64; ++tries) {
        uint64_t position = atomic_load_explicit(&queue->tail, memory_order_acquire);
        cf_ring_cell* cell = cell_of(queue, count, position);
        uint64_t state = atomic_load_explicit(&cell->state, memory_order_acquire);
        const uint64_t claim = pack(position, cf_lease_epoch(owner), row, CLAIMED);
        if (state >> 24 < (position & (UINT64_MAX >> 24))) break; /* the event of one lap ago is still there */
        const bool free = state == pack(position, 0, 0, FREE);
        const bool mine = free && atomic_compare_exchange_strong_explicit(&cell->state, &state, claim,
                                                                          memory_order_acq_rel, memory_order_relaxed);
        const uint64_t here = position;
        atomic_compare_exchange_strong_explicit(&queue->tail, &position, here + 1, memory_order_acq_rel,
                                                memory_order_relaxed);
        if (!mine) continue;
        write_cell(cell, event);
        state = claim;
        if (!atomic_compare_exchange_strong_explicit(&cell->state, &state, pack(here, 0, 0, READY),
                                                     memory_order_release, memory_order_relaxed))
            return cf_fail(CF_ERROR_LEASE_LOST,
                           "event %llu was given up: this reader was taken for dead; push it again",
                           (unsigned long long)here + 1);
        *id = here + 1;
        return CF_SUCCESS;
    }
    return cf_fail(CF_ERROR_QUEUE_FULL, "the queue holds %u events that the writer has not taken; push again later",
                   count);
}

/* Copy a cell out, as far as its own sizes are believable. */
static bool read_cell(const cf_ring_cell* cell, uint64_t position, cf_taken_event* event) {
    const volatile cf_ring_cell* shared = cell; /* each field is read once */
    event->id = position + 1;
    event->kind = shared->kind;
    event->bytes = shared->bytes;
    event->pushed_ns = shared->pushed_ns;
    if (event->bytes > CF_PROMPT_BYTES) return false;
    cf_event checked = {.kind = event->kind};
    if (event->kind == CF_EVENT_PROMPT) {
        memcpy(event->text, cell->as.text, event->bytes);
        event->text[event->bytes] = 0;
        checked.as.prompt = (cf_prompt){event->text, event->bytes};
    } else if (event->kind == CF_EVENT_ACTION) {
        checked.as.action = event->action = (cf_action){shared->as.action.code, shared->as.action.value};
    } else if (event->kind == CF_EVENT_POSE) {
        event->pose.time_ns = shared->as.pose.time_ns;
        for (int i = 0; i < 3; ++i) event->pose.position[i] = shared->as.pose.position[i];
        for (int i = 0; i < 4; ++i) event->pose.orientation[i] = shared->as.pose.orientation[i];
        checked.as.pose = event->pose;
    }
    return cf_queue_check(&checked) == CF_SUCCESS; /* of the copy */
}

/* The claimer of a cell will never write it. */
static bool abandoned(uint64_t state, cf_ring_lease* leases, uint32_t lease_count) {
    const uint32_t row = (uint8_t)(state >> 8);
    if (row >= lease_count) return true;
    const uint64_t owner = atomic_load_explicit(&leases[row].owner, memory_order_acquire);
    const int64_t deadline = atomic_load_explicit(&leases[row].deadline_ns, memory_order_relaxed);
    return cf_lease_epoch(owner) != (uint8_t)(state >> 16) || cf_lease_dead(owner, deadline, cf_os_now_ns());
}

/* The first event from the head on, before `end`, that is complete. *passed: one that is being written was left behind.
 * The head moves over what is done; cells of the dead, and damaged ones, are freed. */
static bool find(cf_queue_reader* reader, cf_ring_queue* queue, uint32_t count, cf_ring_lease* leases,
                 uint32_t lease_count, uint64_t end, uint64_t* position, bool* passed) {
    *passed = false;
    for (uint64_t at = reader->head; at < end; ++at) {
        cf_ring_cell* cell = cell_of(queue, count, at);
        uint64_t state = atomic_load_explicit(&cell->state, memory_order_acquire);
        *position = at;
        if (state == pack(at, 0, 0, READY)) return true;
        if (state == pack(at, 0, 0, FREE)) return false; /* cells are claimed in order */
        const bool taken = state >> 24 == at + count;    /* out of turn; perhaps claimed again already */
        if (!taken) {
            const bool claimed = state >> 24 == at && (state & 0xff) == CLAIMED;
            if ((claimed && !abandoned(state, leases, lease_count)) ||
                !atomic_compare_exchange_strong_explicit(&cell->state, &state, pack(at + count, 0, 0, FREE),
                                                         memory_order_acq_rel, memory_order_relaxed)) {
                *passed = true;
                continue;
            }
            ++reader->dropped;
        }
        if (!*passed) reader->head = at + 1;
    }
    return false;
}

cf_result cf_queue_take(cf_queue_reader* reader, cf_ring_queue* queue, uint32_t count, cf_ring_lease* leases,
                        uint32_t lease_count, cf_taken_event* event) {
    uint64_t position;
    bool passed;
    while (find(reader, queue, count, leases, lease_count, reader->head + count, &position, &passed)) {
        /* What was passed by may be complete by now, and this event pushed after it: look again. What is claimed still
         * was not complete when this event was, so the two were pushed at one time and have no order. */
        if (passed && !find(reader, queue, count, leases, lease_count, position + 1, &position, &passed)) break;
        cf_ring_cell* cell = cell_of(queue, count, position);
        const bool good = read_cell(cell, position, event);
        atomic_store_explicit(&cell->state, pack(position + count, 0, 0, FREE), memory_order_release);
        if (position == reader->head) ++reader->head;
        if (good) return CF_SUCCESS;
        ++reader->dropped;
    }
    return CF_NOT_READY;
}
