"""The window rule of one layer on a GPU, in Triton: one program, no word to the host.

Every entry of the new table is computed from the old one by an index, so nothing depends on the order of writes but
one barrier between the reads and the writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..operands import check_size, check_tensor, on_device
from ..slow_fast_update.operands import check_table
from ..slow_fast_update.reference import SlowFastTable
from ..slow_fast_update.triton import write_spares
from .reference import CUT_POSITIONS, SCENE_FRAMES, WindowRule

OP = "window_update"


@triton.jit
def _update(
    page_ids, positions, sources, count, q_positions, spare_ids, seen_at, decision, ends, start_at, cut_at,
    SINK: tl.constexpr, SLOTS: tl.constexpr, FRAMES: tl.constexpr, RELATIVE: tl.constexpr, WHOLE_SINK: tl.constexpr,
    SCENES: tl.constexpr, SCENE: tl.constexpr, CUT: tl.constexpr, TABLE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Roll the window if the chunk is new and does not fit, put the chunk at its end, then place everything."""
    first, cut = tl.load(start_at), tl.load(cut_at) != 0
    end, seen = tl.load(ends), tl.load(seen_at)
    new = first + FRAMES > seen
    overflow = tl.where(new, tl.maximum(0, end + FRAMES - SLOTS), 0)
    moved = end - overflow - SINK
    end = end + first + FRAMES - seen - overflow

    slot = tl.arange(0, TABLE)
    inside = slot < SLOTS
    moves = (slot >= SINK) & (slot < SINK + moved)
    origin = slot + tl.where(moves, overflow, 0)
    # LongLive never lets a later pass rewrite the sink, except in the first chunk
    kept_sink = (slot < SINK) & (new == 0) & (first > 0) & (SCENES == 0)
    chunk = (slot >= end - FRAMES) & (slot < end) & inside & (kept_sink == 0)
    place = slot - (end - FRAMES)
    ids = tl.load(page_ids + origin, mask=inside & (chunk == 0), other=-1)
    held = tl.load(sources + origin, mask=inside & (chunk == 0), other=-1)
    ids = tl.where(chunk, tl.load(spare_ids + place, mask=chunk, other=-1), ids)
    held = tl.where(chunk, first + place, held)

    if RELATIVE:
        where = tl.where(slot < end, slot, 0)
        query = end - FRAMES
        if SCENES:
            query = tl.where((overflow == 0) & (first < SLOTS), first, SLOTS - FRAMES)
    else:
        where = held
        query = first
    asks = query + slot
    late, newest = slot - (FRAMES - SCENE), slot - (end - SCENE)
    asks = tl.where(cut & (late >= 0), CUT + late, asks)
    where = tl.where(cut & (newest >= 0) & (newest < SCENE), CUT + newest, where)
    tl.debug_barrier()  # all of the old table is read before any of the new one is written

    tl.store(page_ids + slot, ids, mask=inside)
    tl.store(sources + slot, held, mask=inside)
    tl.store(positions + slot, where, mask=inside)
    tl.store(q_positions + slot, asks, mask=slot < FRAMES)
    write_spares(spare_ids, ids, SLOTS, FRAMES, POOL)
    tl.store(ends, end)
    tl.store(count, tl.maximum(end, SINK) if WHOLE_SINK else end)
    tl.store(seen_at, first + FRAMES)
    column = tl.arange(0, 8)
    tl.store(decision + column, tl.where((column == 4) & (overflow > 0), 1, 0), mask=column < 5)


def window_update(table: SlowFastTable, ends, start_frame, rule: WindowRule, *, cut=False) -> None:
    """See `reference.window_update`. start_frame and cut may be (1,) int32 tensors on the device.

    Plain values are copied to the device first, which a captured graph would freeze.
    """
    device = table.page_ids.device
    check_table(table, table.last_key, rule, device.type, OP)
    check_tensor(OP, "ends", ends, 1, (table.count.dtype,), device.type)
    check_size(OP, "length of ends", ends.shape[0], 1, "number of tables")
    _update[(1,)](
        table.page_ids, table.positions, table.sources, table.count, table.q_positions, table.spare_ids, table.seen,
        table.decision, ends, on_device(start_frame, device), on_device(cut, device), SINK=rule.sink,
        SLOTS=rule.slots, FRAMES=rule.chunk_frames, RELATIVE=rule.relative, WHOLE_SINK=rule.whole_sink,
        SCENES=rule.scenes, SCENE=SCENE_FRAMES, CUT=CUT_POSITIONS[0], TABLE=triton.next_power_of_2(rule.slots),
        POOL=triton.next_power_of_2(rule.slots + rule.chunk_frames + 1), num_warps=1,
    )  # fmt: skip
