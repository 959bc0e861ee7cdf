"""Rules: which page sits in which slot, and at which temporal position.

Every policy has one method, `update`, called per layer once a pass has written its keys and values into the table's
spare pages and before its attention. It moves page ids, never data. Since a pass always writes pages that no slot
shows, a slot can keep the page of an earlier pass simply by not being given the new id.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from cfengine.config import MemoryConfig
from cfengine.kernels.slow_fast_update.reference import SlowFastRule
from cfengine.memory.pages import LayerTable, Tables
from cfengine.ops import Ops

NONE, FILL, ROLL = 0, 1, 2  # what a promotion did, LayerTable.decision[3]


class Pass(NamedTuple):
    """One forward over a chunk, as the memory sees it."""

    start_frame: int  # first latent frame of the chunk, counted from the start of the session
    clean: bool = False  # timestep 0: these keys and values stay
    cut: bool = False  # first chunk after a scene cut (relative_window)


class Policy(Protocol):
    """Interface of every rule."""

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """Bring a layer's table up to date with a pass whose keys and values lie in its spare pages.

        key_mean: (dim,) float32, mean of the chunk's normed, unrotated keys      changes row `layer` of `tables`
        """
        ...


class _Row:
    """A layer's table as lists for a rule written in Python; `write` puts the lists back."""

    def __init__(self, table: LayerTable) -> None:
        self.table = table
        self.ids: list[int] = table.page_ids.tolist()
        self.sources: list[int] = table.sources.tolist()
        self.spare: list[int] = table.spare_ids.tolist()
        self.end, self.seen = int(table.count), int(table.seen)

    def write(self, positions: list[int], q_positions: list[int], *, action: int = NONE, shifted: bool = False) -> None:
        frames, slots = len(self.spare), len(self.ids)
        used = set(self.ids)
        self.spare = [page for page in range(1, slots + frames + 1) if page not in used][:frames]
        pairs = (
            (self.table.page_ids, self.ids),
            (self.table.positions, positions + [0] * (slots - len(positions))),
            (self.table.sources, self.sources),
            (self.table.count, [self.end]),
            (self.table.q_positions, q_positions),
            (self.table.spare_ids, self.spare),
            (self.table.seen, [self.seen]),
            (self.table.decision, [0, 0, 0, action, int(shifted)]),
        )
        for tensor, values in pairs:
            tensor.copy_(torch.tensor(values, dtype=torch.int32))


class SlowFast:
    """The released code's rule (`slow_fast`), and promotion by frame number (`uniform`): see `slow_fast_update`."""

    def __init__(self, config: MemoryConfig, ops: Ops) -> None:
        self._update = ops.slow_fast_update
        self.rule = SlowFastRule(
            sink=config.sink,
            slow=config.slots - config.sink - config.fast,
            fast=config.fast,
            slots=config.slots,
            chunk_frames=config.chunk_frames,
            keep=config.keep,
            rope_length=config.rope_length,
            threshold=config.threshold,
            interval=config.interval if config.policy == "uniform" else 0,
        )

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """See `Policy.update`."""
        self._update(tables.layers[layer], key_mean, step.start_frame, self.rule)


class SlowFastPaper:
    """The paper's rule (arXiv 2602.06028, section 3.3): clean keys decide, pages are promoted out of fast memory.

    After the clean pass of chunks 1, 3, 5, ... the mean clean key is compared with that of the chunk before; below the
    threshold the chunk's first page is marked. Marked pages that leave fast memory join slow memory, others are
    dropped; sink, slow and fast stay disjoint, and slots that hold nothing are not attended.
    """

    def __init__(self, config: MemoryConfig, ops: Ops) -> None:
        self.config = config

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """See `Policy.update`; only clean passes compare key_mean."""
        config, table, marked = self.config, tables.layers[layer], tables.marked[layer]
        frames, first = config.chunk_frames, step.start_frame
        row, marks = _Row(table), marked.tolist()
        slow = int(table.promoted)
        action, shifted = NONE, False
        if first + frames > row.seen:
            pages = list(zip(row.ids[: row.end], row.sources[: row.end], marks[: row.end], strict=True))
            incoming = [(row.spare[i], first + i, 0) for i in range(frames)]
            sink_now = min(row.end, config.sink)
            sink, kept, fast = pages[:sink_now], pages[sink_now : sink_now + slow], pages[sink_now + slow :]
            room = config.sink - len(sink)
            sink, fast = sink + incoming[:room], fast + incoming[room:]
            while len(fast) > config.fast:
                page, shifted = fast.pop(0), True
                if page[2] and config.slow:
                    action = FILL if len(kept) < config.slow else ROLL
                    kept = (kept + [page])[-config.slow :]
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
        if step.clean:
            if (first // frames) % 2 == 1:
                mean, last = key_mean.double(), table.last_key.double()
                similarity = float(torch.dot(mean, last) / (mean.norm() * last.norm()).clamp_min(1e-16))
                if similarity < config.threshold:
                    marks[row.sources.index(first)] = 1
            table.last_key.copy_(key_mean)
        marked.copy_(torch.tensor(marks, dtype=torch.int32))
        table.promoted.fill_(slow)
        table.similarity.fill_(similarity)

        anchor = min(first + frames - 1, config.rope_length - 1)
        sink_now = min(row.end, config.sink)
        start = max(0, anchor - (row.end - sink_now) + 1)
        positions = list(range(sink_now)) + [start + i for i in range(row.end - sink_now)]
        query = max(0, anchor - frames + 1)
        row.write(positions, [query + i for i in range(frames)], action=action, shifted=shifted)


class Window:
    """A sliding window behind an optional sink, at absolute or at window-relative positions.

    `fifo`: Self-Forcing (`wan/modules/causal_model.py`), no sink, absolute positions.  `sink_window`: LongLive v1.0,
    the first frames are kept for ever.  `relative_window`: position = slot number, LongLive's infinity file, or with
    `MemoryConfig.scenes` Infinity-RoPE, whose query sits at the frame number until the window is full.
    """

    def __init__(self, config: MemoryConfig, ops: Ops) -> None:
        self.config, self.sink = config, config.kept_sink
        self.relative = config.policy == "relative_window"

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """See `Policy.update`; key_mean is not looked at."""
        config, sink = self.config, self.sink
        frames, slots, first = config.chunk_frames, config.slots, step.start_frame
        row = _Row(tables.layers[layer])
        end = int(tables.ends[layer])
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
            if slot < sink and not new and first > 0 and not config.scenes:
                continue
            row.ids[slot], row.sources[slot] = row.spare[i], first + i

        # LongLive attends to the whole sink, also to what the first chunk has not filled of it
        row.end = max(end, sink) if config.policy == "sink_window" else end
        if not self.relative:
            positions, query = list(row.sources), first
        else:
            in_window = config.scenes and not overflow and first < slots
            positions = list(range(end))
            query = first if in_window else slots - frames if config.scenes else end - frames
        q_positions = [query + i for i in range(frames)]
        if step.cut:
            q_positions[-SCENE_FRAMES:] = CUT_POSITIONS
            positions[end - SCENE_FRAMES : end] = CUT_POSITIONS
        tables.ends[layer] = end
        row.write(positions, q_positions, shifted=overflow > 0)

    def flush(self, tables: Tables) -> None:
        """Start a new scene (Infinity-RoPE): keep the first frame and the last two slots, forget the rest."""
        for table in tables.layers:
            ids, sources = table.page_ids.tolist(), table.sources.tolist()
            ids[1:SCENE_FRAMES], sources[1:SCENE_FRAMES] = ids[-2:], sources[-2:]
            table.page_ids.copy_(torch.tensor(ids, dtype=torch.int32))
            table.sources.copy_(torch.tensor(sources, dtype=torch.int32))
        tables.ends.fill_(SCENE_FRAMES)
        tables.stacked.count.fill_(SCENE_FRAMES)


SCENE_FRAMES = 3  # what Infinity-RoPE keeps across a scene, and the length of its rotary cut
CUT_POSITIONS = [45, 46, 47]

_RULES = {
    "slow_fast": SlowFast,
    "uniform": SlowFast,
    "slow_fast_paper": SlowFastPaper,
    "fifo": Window,
    "sink_window": Window,
    "relative_window": Window,
}


def make_policy(config: MemoryConfig, ops: Ops) -> Policy:
    """Build the rule named by `config.policy`."""
    return _RULES[config.policy](config, ops)
