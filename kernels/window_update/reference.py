"""A sliding window behind an optional sink, for one layer."""

from __future__ import annotations

from typing import NamedTuple

from ..rows import Row
from ..slow_fast_update.reference import SlowFastTable

SCENE_FRAMES = 3  # length of Infinity-RoPE's rotary cut
CUT_POSITIONS = (45, 46, 47)


class WindowRule(NamedTuple):
    """Sizes in latent frames, and which of the public codes is followed where they differ."""

    sink: int
    slots: int
    chunk_frames: int
    relative: bool  # positions count slots, not frames
    whole_sink: bool  # the sink is attended whole, also what the first chunk has not filled of it (LongLive)
    scenes: bool  # Infinity-RoPE


def window_update(table: SlowFastTable, ends, start_frame, rule: WindowRule, *, cut=False) -> None:
    """Bring the table up to date with a pass whose keys and values were just written to `spare_ids`.

    `fifo`: Self-Forcing (`wan/modules/causal_model.py`), no sink, absolute positions.  `sink_window`: LongLive v1.0,
    the first frames are kept for ever.  `relative_window`: position = slot number, LongLive's infinity file, or with
    scenes Infinity-RoPE, whose query sits at the frame number until the window is full.

    ends: (1,) int32, slots written      start_frame: first latent frame of the chunk, an int or (1,) int32
    cut: a bool or (1,) int32; the query and the newest frames sit at CUT_POSITIONS (chunks of at least 3 frames)
    table, ends: updated in place
    """
    sink, slots, frames, relative, whole_sink, scenes = rule
    first, row, end = int(start_frame), Row(table), int(ends)
    new = first + frames > row.seen
    overflow = max(0, end + frames - slots) if new else 0
    moved = end - overflow - sink
    if overflow and moved > 0:
        for values in (row.ids, row.sources):
            values[sink : sink + moved] = values[sink + overflow : sink + overflow + moved]
    end += first + frames - row.seen - overflow
    row.seen = first + frames
    for i in range(frames):
        slot = end - frames + i
        # LongLive never lets a later pass rewrite the sink, except in the first chunk
        if slot < sink and not new and first > 0 and not scenes:
            continue
        row.ids[slot], row.sources[slot] = row.spare[i], first + i

    row.end = max(end, sink) if whole_sink else end
    if not relative:
        positions, query = list(row.sources), first
    else:
        in_window = scenes and not overflow and first < slots
        positions = list(range(end))
        query = first if in_window else slots - frames if scenes else end - frames
    q_positions = [query + i for i in range(frames)]
    if int(cut):
        q_positions[-SCENE_FRAMES:] = CUT_POSITIONS
        positions[end - SCENE_FRAMES : end] = CUT_POSITIONS
    ends.fill_(end)
    row.write(positions, q_positions, shifted=overflow > 0)
