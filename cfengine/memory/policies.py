"""Rules: which page sits in which slot, and at which temporal position.

Every policy has one method, `update`, called per layer once a pass has written its keys and values into the table's
spare pages and before its attention. It moves page ids, never data. Since a pass always writes pages that no slot
shows, a slot can keep the page of an earlier pass simply by not being given the new id.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from cfengine.config import MemoryConfig
from cfengine.kernels.slow_fast_paper_update.reference import PaperRule
from cfengine.kernels.slow_fast_update.reference import SlowFastRule
from cfengine.kernels.window_update.reference import WindowRule
from cfengine.memory.pages import Tables
from cfengine.ops import Ops

SCENE_FRAMES = 3  # what Infinity-RoPE keeps across a scene


class Pass(NamedTuple):
    """One forward over a chunk, as the memory sees it; tensors are (1,) int32 that a captured graph reads anew."""

    start_frame: int | torch.Tensor  # first latent frame of the chunk, counted from the start of the session
    clean: bool = False  # timestep 0: these keys and values stay
    cut: bool | torch.Tensor = False  # first chunk after a scene cut (relative_window)
    near: bool = False  # attends to the sink and the nearest slots alone; what is kept, and where, stays the same


class Policy(Protocol):
    """Interface of every rule; `op` is the operation that it is."""

    op: str

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """Bring a layer's table up to date with a pass whose keys and values lie in its spare pages.

        key_mean: (dim,) float32, mean of the chunk's normed, unrotated keys      changes row `layer` of `tables`
        """
        ...


class SlowFast:
    """The released code's rule (`slow_fast`), and promotion by frame number (`uniform`): see `slow_fast_update`."""

    op = "slow_fast_update"

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
    """The paper's rule: see `slow_fast_paper_update`."""

    op = "slow_fast_paper_update"

    def __init__(self, config: MemoryConfig, ops: Ops) -> None:
        self._update = ops.slow_fast_paper_update
        self.rule = PaperRule(
            sink=config.sink,
            slow=config.slow,
            fast=config.fast,
            slots=config.slots,
            chunk_frames=config.chunk_frames,
            rope_length=config.rope_length,
            threshold=config.threshold,
        )

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """See `Policy.update`; only clean passes compare key_mean."""
        table, marked = tables.layers[layer], tables.marked[layer]
        self._update(table, marked, key_mean, step.start_frame, self.rule, clean=step.clean)


class SlowFastDiverse(SlowFastPaper):
    """The paper's rule whose full slow memory drops what it holds twice: see `slow_fast_diverse_update`."""

    op = "slow_fast_diverse_update"

    def __init__(self, config: MemoryConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self._update = ops.slow_fast_diverse_update

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """See `Policy.update`; only clean passes look at key_mean."""
        table, marked, descriptors = tables.layers[layer], tables.marked[layer], tables.descriptors[layer]
        self._update(table, marked, descriptors, key_mean, step.start_frame, self.rule, clean=step.clean)


class Window:
    """A sliding window behind an optional sink (`fifo`, `sink_window`, `relative_window`): see `window_update`."""

    op = "window_update"

    def __init__(self, config: MemoryConfig, ops: Ops) -> None:
        self._update = ops.window_update
        self.rule = WindowRule(
            sink=config.kept_sink,
            slots=config.slots,
            chunk_frames=config.chunk_frames,
            relative=config.policy == "relative_window",
            whole_sink=config.policy == "sink_window",
            scenes=config.scenes,
        )

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """See `Policy.update`; key_mean is not looked at."""
        self._update(tables.layers[layer], tables.ends[layer], step.start_frame, self.rule, cut=step.cut)

    def flush(self, tables: Tables) -> None:
        """Start a new scene (Infinity-RoPE): keep the first frame and the last two, forget the rest.

        Where the window is not full yet the original keeps its last two slots, which nothing has written. Of fewer
        than three frames nothing is forgotten.
        """
        kept = SCENE_FRAMES - 1
        last = tables.ends.clamp_min(SCENE_FRAMES) - kept + torch.arange(kept, device=tables.ends.device)
        for rows in (tables.stacked.page_ids, tables.stacked.sources):
            rows[:, 1:SCENE_FRAMES] = rows.gather(1, last.long())
        tables.ends.clamp_max_(SCENE_FRAMES)
        tables.stacked.count.copy_(tables.ends)


_RULES = {
    "slow_fast": SlowFast,
    "uniform": SlowFast,
    "slow_fast_paper": SlowFastPaper,
    "slow_fast_diverse": SlowFastDiverse,
    "fifo": Window,
    "sink_window": Window,
    "relative_window": Window,
}


def flushes(config: MemoryConfig) -> bool:
    """Whether a memory can be flushed in mid-stream: it is a window, and what stays fills its sink."""
    return _RULES[config.policy] is Window and config.slots >= SCENE_FRAMES >= config.kept_sink


def make_policy(config: MemoryConfig, ops: Ops) -> Policy:
    """Build the rule named by `config.policy`."""
    return _RULES[config.policy](config, ops)
