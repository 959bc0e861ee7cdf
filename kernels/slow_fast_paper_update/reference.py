"""The Slow-Fast rule of the paper, for one layer: clean keys decide, pages are promoted out of fast memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..rows import FILL, NONE, ROLL, Row
from ..slow_fast_update.reference import SlowFastTable


class PaperRule(NamedTuple):
    """Sizes in latent frames; fast >= chunk_frames."""

    sink: int
    slow: int
    fast: int
    slots: int
    chunk_frames: int
    rope_length: int
    threshold: float


def slow_fast_paper_update(table: SlowFastTable, marked, key_mean, start_frame, rule: PaperRule, *, clean: bool):
    """Bring the table up to date with a pass whose keys and values were just written to `spare_ids`.

    The paper's rule (arXiv 2602.06028, section 3.3). After the clean pass of chunks 1, 3, 5, ... the mean clean key is
    compared with that of the chunk before; below the threshold the chunk's first page is marked. Marked pages that
    leave fast memory join slow memory, others are dropped; sink, slow and fast stay disjoint, and slots that hold
    nothing are not attended.

    marked: (slots,) int32, 1 where the page will join slow memory      key_mean: (dim,) float32, compared when clean
    start_frame: first latent frame of the chunk, an int or (1,) int32      table, marked: updated in place
    """
    sink_size, slow_size, fast_size, _, frames, rope_length, threshold = rule
    first, row, marks = int(start_frame), Row(table), marked.tolist()
    slow = int(table.promoted)
    action, shifted = NONE, False
    if first + frames > row.seen:
        pages = list(zip(row.ids[: row.end], row.sources[: row.end], marks[: row.end], strict=True))
        incoming = [(row.spare[i], first + i, 0) for i in range(frames)]
        sink_now = min(row.end, sink_size)
        sink, kept, fast = pages[:sink_now], pages[sink_now : sink_now + slow], pages[sink_now + slow :]
        room = sink_size - len(sink)
        sink, fast = sink + incoming[:room], fast + incoming[room:]
        while len(fast) > fast_size:
            page, shifted = fast.pop(0), True
            if page[2] and slow_size:
                action = FILL if len(kept) < slow_size else ROLL
                kept = (kept + [page])[-slow_size:]
        slow = len(kept)
        pages = sink + kept + fast
        row.end, row.seen = len(pages), first + frames
        padding = len(row.ids) - row.end
        row.ids = [page[0] for page in pages] + [0] * padding
        row.sources = [page[1] for page in pages] + [-1] * padding
        marks = [page[2] for page in pages] + [0] * padding
    else:
        for slot, source in enumerate(row.sources):
            if source >= first:
                row.ids[slot] = row.spare[source - first]

    similarity = float("nan")
    if clean:
        if (first // frames) % 2 == 1:
            mean, last = key_mean.double(), table.last_key.double()
            similarity = float(torch.dot(mean, last) / (mean.norm() * last.norm()).clamp_min(1e-16))
            if similarity < threshold:
                marks[row.sources.index(first)] = 1
        table.last_key.copy_(key_mean)
    marked.copy_(torch.tensor(marks, dtype=torch.int32))
    table.promoted.fill_(slow)
    table.similarity.fill_(similarity)

    anchor = min(first + frames - 1, rope_length - 1)
    sink_now = min(row.end, sink_size)
    start = max(0, anchor - (row.end - sink_now) + 1)
    positions = list(range(sink_now)) + [start + i for i in range(row.end - sink_now)]
    query = max(0, anchor - frames + 1)
    row.write(positions, [query + i for i in range(frames)], action=action, shifted=shifted)
