"""The paper's Slow-Fast rule of one layer on a GPU, in Triton: one program, no word to the host.

Every entry of the new table is an index into the old one, or into the pages just written: sink, then slow memory with
the marked pages that leave fast memory behind it, cut to its size from the front, then what stays fast. Nothing depends
on the order of writes but one barrier between the reads and the writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..operands import check_size, check_tensor, on_device
from ..slow_fast_update.operands import check_table
from ..slow_fast_update.reference import SlowFastTable
from ..slow_fast_update.triton import cosine, remember, write_spares
from .reference import PaperRule

OP = "slow_fast_paper_update"
NEW = tl.constexpr(1 << 20)  # an origin from here on is a place in the pages just written; EMPTY is none
EMPTY = tl.constexpr(1 << 21)


@triton.jit
def _update(
    page_ids, positions, sources, count, q_positions, spare_ids, promoted_at, seen_at, last_key, decision,
    similarity_at, marked, key_mean, start_at, dim, threshold,
    SINK: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, SLOTS: tl.constexpr, FRAMES: tl.constexpr,
    ROPE: tl.constexpr, CLEAN: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    first = tl.load(start_at)
    end, slow, seen = tl.load(count), tl.load(promoted_at), tl.load(seen_at)
    new = first + FRAMES > seen
    slot = tl.arange(0, TABLE)
    inside = slot < SLOTS
    marks = tl.load(marked + slot, mask=inside, other=0)

    sink = tl.minimum(end, SINK)
    entering = tl.minimum(SINK - sink, FRAMES)  # frames of the chunk that the sink still takes
    low = sink + slow  # first fast slot
    fast = end - low
    leaving = tl.maximum(0, fast + FRAMES - entering - FAST)
    joins = (slot >= low) & (slot < low + leaving) & (marks != 0) & (SLOW > 0)
    joining = tl.sum(joins.to(tl.int32), 0)
    dropped = tl.maximum(0, slow + joining - SLOW)
    new_sink, new_slow = sink + entering, slow + joining - dropped
    new_low = new_sink + new_slow
    new_end = new_low + fast + FRAMES - entering - leaving

    # the joining page of rank r stands at the slot where `rank` first reaches r
    rank = tl.cumsum(joins.to(tl.int32), 0) - 1
    wanted = slot - new_sink + dropped - slow
    match = (rank[None, :] == wanted[:, None]) & joins[None, :]
    joined = tl.sum(tl.where(match, slot[None, :], 0), 1)
    in_slow = tl.where(wanted < 0, sink + slot - new_sink + dropped, joined)
    newest = slot - new_low + leaving
    in_fast = tl.where(newest < fast, low + newest, NEW + entering + newest - fast)
    in_sink = tl.where(slot < sink, slot, NEW + slot - sink)
    origin = tl.where(slot < new_sink, in_sink, tl.where(slot < new_low, in_slow, in_fast))
    origin = tl.where(slot < new_end, origin, EMPTY)

    held = tl.load(sources + slot, mask=inside, other=-1)
    rewritten = tl.where(held >= first, NEW + held - first, slot)  # a later pass over the same chunk
    origin = tl.where(new, origin, rewritten)
    old, fresh = inside & (origin < NEW), inside & (origin >= NEW) & (origin < EMPTY)
    spare = tl.load(spare_ids + origin - NEW, mask=fresh, other=0)
    ids = tl.where(fresh, spare, tl.load(page_ids + origin, mask=old, other=0))
    moved = tl.where(fresh, first + origin - NEW, tl.load(sources + origin, mask=old, other=-1))
    kept = tl.load(marked + origin, mask=old, other=0)
    held, marks = tl.where(new, moved, held), tl.where(new, kept, marks)
    used = tl.where(inside, ids, -1)

    last = slow + joining - 1  # pages in slow memory when the last of them joined, before any was dropped
    action = tl.where(new & (joining > 0), tl.where(last < SLOW, 1, 2), 0)
    shifted = new & (leaving > 0)
    end, slow, sink = tl.where(new, new_end, end), tl.where(new, new_slow, slow), tl.where(new, new_sink, sink)
    similarity = float("nan")
    if CLEAN:
        odd = (first // FRAMES) % 2 == 1
        likeness = cosine(key_mean, last_key, dim, WIDTH)
        similarity = tl.where(odd, likeness, float("nan"))
        marks = tl.where(odd & (likeness < threshold) & (held == first), 1, marks)

    anchor = tl.minimum(first + FRAMES - 1, ROPE - 1)
    rest = tl.maximum(0, anchor - (end - sink) + 1)
    where = tl.where(slot < sink, slot, tl.where(slot < end, rest + slot - sink, 0))
    query = tl.maximum(0, anchor - FRAMES + 1)
    tl.debug_barrier()  # all of the old table is read before any of the new one is written

    tl.store(page_ids + slot, ids, mask=inside)
    tl.store(sources + slot, held, mask=inside)
    tl.store(marked + slot, marks, mask=inside)
    tl.store(positions + slot, where, mask=inside)
    tl.store(q_positions + slot, query + slot, mask=slot < FRAMES)
    write_spares(spare_ids, used, SLOTS, FRAMES, POOL)
    if CLEAN:
        remember(last_key, key_mean, dim, WIDTH)
    tl.store(count, end)
    tl.store(promoted_at, slow)
    tl.store(seen_at, tl.maximum(seen, first + FRAMES))
    tl.store(similarity_at, similarity)
    column = tl.arange(0, 8)
    choice = tl.where(column == 3, action, tl.where((column == 4) & shifted, 1, 0))
    tl.store(decision + column, choice, mask=column < 5)


def slow_fast_paper_update(table: SlowFastTable, marked, key_mean, start_frame, rule: PaperRule, *, clean: bool):
    """See `reference.slow_fast_paper_update`. start_frame may be a (1,) int32 tensor on the device.

    An int is copied to the device first, which a captured graph would freeze.
    """
    device = key_mean.device
    check_table(table, key_mean, rule, device.type, OP)
    check_tensor(OP, "marked", marked, 1, (table.page_ids.dtype,), device.type)
    check_size(OP, "length of marked", marked.shape[0], rule.slots, "slots")
    dim = key_mean.shape[0]
    _update[(1,)](
        *table, marked, key_mean, on_device(start_frame, device), dim, rule.threshold, SINK=rule.sink,
        SLOW=rule.slow, FAST=rule.fast, SLOTS=rule.slots, FRAMES=rule.chunk_frames, ROPE=rule.rope_length,
        CLEAN=clean, WIDTH=min(1024, triton.next_power_of_2(dim)), TABLE=triton.next_power_of_2(rule.slots),
        POOL=triton.next_power_of_2(rule.slots + rule.chunk_frames + 1), num_warps=4,
    )  # fmt: skip
