"""The Slow-Fast rule of one layer on a GPU, in Triton: one program, no word to the host.

Every entry of the new table is computed from the old one by an index (roll of slow memory, then shift of fast memory,
then the chunk), so nothing depends on the order of writes but one barrier between the reads and the writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..operands import on_device
from .operands import check_table
from .reference import SlowFastRule, SlowFastTable


@triton.jit
def cosine(key_mean, last_key, dim, WIDTH: tl.constexpr):
    """Cosine of two vectors of `dim` numbers, summed in float64, as float32."""
    product = tl.zeros((WIDTH,), tl.float64)
    ours, theirs = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    for first in range(0, dim, WIDTH):
        channel = first + tl.arange(0, WIDTH)
        mean = tl.load(key_mean + channel, mask=channel < dim, other=0.0).to(tl.float64)
        last = tl.load(last_key + channel, mask=channel < dim, other=0.0).to(tl.float64)
        product += mean * last
        ours += mean * mean
        theirs += last * last
    length = tl.sqrt(tl.sum(ours, 0)) * tl.sqrt(tl.sum(theirs, 0))
    return (tl.sum(product, 0) / tl.maximum(length, 1e-16)).to(tl.float32)


@triton.jit
def remember(last_key, key_mean, dim, WIDTH: tl.constexpr):
    """last_key = key_mean"""
    for first in range(0, dim, WIDTH):
        channel = first + tl.arange(0, WIDTH)
        tl.store(last_key + channel, tl.load(key_mean + channel, mask=channel < dim), mask=channel < dim)


@triton.jit
def write_spares(spare_ids, ids, SLOTS: tl.constexpr, FRAMES: tl.constexpr, POOL: tl.constexpr):
    """spare_ids = the first FRAMES pages of 1 .. SLOTS + FRAMES that no entry of `ids` names."""
    page = tl.arange(0, POOL)
    used = tl.sum((page[:, None] == ids[None, :]).to(tl.int32), 1) > 0
    free = (page >= 1) & (page <= SLOTS + FRAMES) & (used == 0)
    rank = tl.cumsum(free.to(tl.int32), 0) - 1
    tl.store(spare_ids + rank, page, mask=free & (rank < FRAMES))


@triton.jit
def _update(
    page_ids, positions, sources, count, q_positions, spare_ids, promoted_at, seen_at, last_key, decision,
    similarity_at, key_mean, start_at, dim, threshold,
    SINK: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, SLOTS: tl.constexpr, FRAMES: tl.constexpr,
    KEEP: tl.constexpr, ROPE: tl.constexpr, INTERVAL: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    POOL: tl.constexpr,
):  # fmt: skip
    start = tl.load(start_at)
    end, promoted, seen = tl.load(count), tl.load(promoted_at), tl.load(seen_at)

    likeness = cosine(key_mean, last_key, dim, WIDTH)
    if INTERVAL > 0:
        keyframe = (start >= FAST) & (start % INTERVAL == 0)
        similarity = float("nan")
    else:
        keyframe = (start >= FAST) & (likeness < threshold)
        similarity = tl.where(start >= FAST, likeness, float("nan"))

    newest = tl.load(sources + tl.maximum(SINK + promoted - 1, 0))
    already = (promoted > 0) & (newest == start)
    can_fill = (KEEP > 0) & (SINK + promoted + KEEP + FAST <= SLOTS)
    promotes = keyframe & (already == 0) & (KEEP > 0)
    fills = promotes & can_fill
    rolls = promotes & (can_fill == 0) & (SLOW > KEEP)
    action = tl.where(fills, 1, tl.where(rolls, 2, 0))
    low = tl.where(fills, SINK + promoted, SLOTS - FAST - KEEP)
    promoted += tl.where(fills, KEEP, 0)

    shift = (start + FRAMES > seen) & (end + FRAMES > SLOTS)
    end = end - tl.where(shift, FRAMES, 0) + start + FRAMES - seen
    slot = tl.arange(0, TABLE)
    moves = shift & (slot >= SLOTS - FAST) & (slot < SLOTS - FRAMES)
    old = slot + tl.where(moves, FRAMES, 0)  # place after the promotion of what the slot shows after the shift
    enters = (action > 0) & (old >= low) & (old < low + KEEP)
    rolled = rolls & (old >= SINK) & (old < low)
    origin = old + tl.where(rolled, KEEP, 0)
    inside = slot < SLOTS
    chunk = (slot >= end - FRAMES) & (slot < end)
    new = tl.where((chunk | enters) & inside, 1, 0) > 0  # the scalars in it make the bare mask an integer
    kept = inside & (new == 0)
    place = tl.where(chunk, slot - (end - FRAMES), old - low)
    ids = tl.load(page_ids + origin, mask=kept, other=-1)
    held = tl.load(sources + origin, mask=kept, other=-1)
    ids = tl.where(new, tl.load(spare_ids + place, mask=new, other=-1), ids)
    held = tl.where(new, start + place, held)

    anchor = tl.minimum(start + FRAMES - 1, ROPE - 1)
    rest = tl.maximum(0, anchor - (end - SINK) + 1)
    query = tl.maximum(0, anchor - FRAMES + 1)
    tl.debug_barrier()  # all of the old table is read before any of the new one is written

    tl.store(page_ids + slot, ids, mask=inside)
    tl.store(sources + slot, held, mask=inside)
    tl.store(positions + slot, tl.where(slot < SINK, slot, rest + slot - SINK), mask=inside)
    tl.store(q_positions + slot, query + slot, mask=slot < FRAMES)
    write_spares(spare_ids, ids, SLOTS, FRAMES, POOL)
    remember(last_key, key_mean, dim, WIDTH)
    tl.store(count, end)
    tl.store(promoted_at, promoted)
    tl.store(seen_at, start + FRAMES)
    tl.store(similarity_at, similarity)
    tl.store(decision, keyframe.to(tl.int32))
    tl.store(decision + 1, already.to(tl.int32))
    tl.store(decision + 2, can_fill.to(tl.int32))
    tl.store(decision + 3, action)
    tl.store(decision + 4, shift.to(tl.int32))


def slow_fast_update(table: SlowFastTable, key_mean, start_frame, rule: SlowFastRule) -> None:
    """See `reference.slow_fast_update`. start_frame may be a (1,) int32 tensor on the device.

    An int is copied to the device first, which a captured graph would freeze.
    """
    check_table(table, key_mean, rule, key_mean.device.type)
    dim = key_mean.shape[0]
    _update[(1,)](
        *table, key_mean, on_device(start_frame, key_mean.device), dim, rule.threshold, SINK=rule.sink,
        SLOW=rule.slow, FAST=rule.fast, SLOTS=rule.slots, FRAMES=rule.chunk_frames, KEEP=rule.keep,
        ROPE=rule.rope_length, INTERVAL=rule.interval, WIDTH=min(1024, triton.next_power_of_2(dim)),
        TABLE=triton.next_power_of_2(rule.slots), POOL=triton.next_power_of_2(rule.slots + rule.chunk_frames + 1),
        num_warps=4,
    )  # fmt: skip
