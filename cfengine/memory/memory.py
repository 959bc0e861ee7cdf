"""A session's memory: pages, tables and rule, and the attention that reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.memory.pages import PagePool, Tables
from cfengine.memory.policies import Pass, SlowFastPaper, Window, make_policy
from cfengine.ops import Ops
from cfengine.types import LayerEvents


class Memory:
    """A session's pages, tables and rule, and the attention that reads them."""

    def __init__(self, config: EngineConfig, ops: Ops, dtype, device="cpu") -> None:
        self.pool = PagePool(config, dtype, device)
        self.tables = Tables(config, device)
        self.policy = make_policy(config.memory, ops)
        self.ops = ops
        self.promotions = torch.zeros((), dtype=torch.int64, device=device)
        self.sink = config.memory.kept_sink
        self.keep = 1 if isinstance(self.policy, SlowFastPaper) else config.memory.keep
        self.grid, self.eps, self.theta = config.grid, config.model.eps, config.model.theta
        kept = config.precision.pages == "fp8" and config.precision.attention != "fp8"
        self.products = {"wide": True} if kept else {}  # e4m3 pages, products in 16 bits

    @property
    def bytes(self) -> int:
        """Size of keys and values, fixed for the life of the session."""
        return self.pool.bytes

    def attend(
        self, layer: int, q: Tensor | None, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor], step: Pass
    ) -> Tensor | None:
        """Write the chunk's pages, let the rule move ids, attend.

        q, k, v: (tokens, dim) before norms; q None leaves the pages up to date and attends to nothing
        -> (tokens, heads, head_dim) or None
        """
        table = self.tables.layers[layer]
        k_pages, v_pages, scales = self.pool.k[layer], self.pool.v[layer], self.pool.scales(layer)
        query, key_mean = self.ops.qk_norm_rope_store(
            q, k, v, *norms, k_pages, v_pages, table.spare_ids, self.grid, eps=self.eps, theta=self.theta, **scales
        )
        self.policy.update(self.tables, layer, key_mean, step)
        if query is None:
            return None
        return self.ops.paged_attention(
            query, k_pages, v_pages, table.page_ids, table.positions, table.count, table.q_positions, theta=self.theta,
            **scales, **self.products,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.pool.k.device

    def flush(self) -> None:
        """Start a new scene, where the policy knows scenes."""
        if isinstance(self.policy, Window):
            self.policy.flush(self.tables)

    def end_pass(self) -> None:
        """Count the pages promoted in a pass, on the device."""
        self.promotions += self.keep * (self.tables.stacked.decision[:, 3] > 0).sum()

    def slots_in_use(self, layer: int) -> int:
        """Slots that a layer has written, from the first; a window's sink may be attended beyond them."""
        windowed = isinstance(self.policy, Window)
        return int(self.tables.ends[layer] if windowed else self.tables.layers[layer].count)

    def reset(self) -> None:
        """Forget everything, in place: what a new session finds."""
        self.tables.reset()
        self.promotions.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        return {**self.pool.tensors(), **self.tables.tensors(), "promotions": self.promotions}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over `tensors` of a memory of the same configuration, in place; a page alone is `k.<layer>.<page>`."""
        own = self.tensors()
        for name, theirs in tensors.items():
            part, *place = name.split(".")
            (own[part][int(place[0]), int(place[1])] if place else own[part]).copy_(theirs)

    def misfits(self, tensors: dict[str, Tensor], start: int) -> list[str]:
        """Tables in `tensors` that no memory of this shape has after `start` frames; rules index by what they say."""
        slots, pages = self.tables.stacked.page_ids.shape[1], self.pool.k.shape[1]
        ranges = {
            "page_ids": (0, pages - 1),
            "spare_ids": (1, pages - 1),
            "count": (0, slots),
            "ends": (0, slots),
            "promoted": (0, slots - self.sink),
            "sources": (-1, start - 1),
            "seen": (start, start),
        }
        found = {name: tensors[name].flatten().tolist() for name in ranges}
        return [name for name, (low, high) in ranges.items() if min(found[name]) < low or max(found[name]) > high]

    def show(self, out: Shown | None = None) -> Shown:
        """Copy to host memory what the tables show; without waiting, where `out` lies in pinned memory."""
        if out is None:
            return Shown(*(tensor.to("cpu", copy=True) for tensor in self.shown()))
        for place, tensor in zip(out, self.shown(), strict=True):
            place.copy_(tensor, non_blocking=True)
        return out

    def shown(self) -> Shown:
        """What the tables show, where they are."""
        return Shown(self.promotions, self.tables.stacked.sources, self.tables.stacked.count)


class Shown(NamedTuple):
    """What a memory shows; in host memory, what it showed at one time: a point to count events from."""

    promotions: Tensor  # () int64, so far
    sources: Tensor  # (layers, slots) int32
    counts: Tensor  # (layers, 1) int32

    def chunks(self, frames: int) -> dict[int, int]:
        """First frames of the chunks of `frames` that are shown, in order, and how many layers show each."""
        layers, sources = np.divmod(self._frames(), 1 << 40)
        starts = np.unique((layers << 40) + sources // frames * frames) & ((1 << 40) - 1)
        return dict(zip(*(array.tolist() for array in np.unique(starts, return_counts=True)), strict=True))

    def events_until(self, later: Shown) -> LayerEvents:
        """Promotions and evictions since; an eviction is a frame that no slot of its layer shows any more."""
        gone = np.setdiff1d(self._frames(), later._frames())
        return LayerEvents(int(later.promotions) - int(self.promotions), int(gone.size))

    def _frames(self) -> np.ndarray:
        """Sorted (layer, source frame) pairs as single integers."""
        sources, counts = self.sources.numpy().astype(np.int64), self.counts.numpy()
        used = (sources >= 0) & (np.arange(sources.shape[1]) < counts)
        return np.unique((sources + (np.arange(len(sources))[:, None] << 40))[used])
