"""A session's memory: pages, tables and rule, and the attention that reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.memory.budget import Budget, Lease, PageView
from cfengine.memory.pages import LayerTable, PagePool, Tables, near_slots, session_pages
from cfengine.memory.policies import Pass, SlowFastPaper, Window, make_policy
from cfengine.ops import Ops
from cfengine.types import LayerEvents


class Memory:
    """A session's pages, tables and rule, and the attention that reads them.

    Its pages are its own, allocated here, or lent by a budget: then it is a seat, that one session after another takes
    with `open` and leaves with `close`. Tables and rules are the same in both.
    """

    def __init__(self, config: EngineConfig, ops: Ops, dtype, device="cpu", budget: Budget | None = None) -> None:
        self.pool = PagePool(config, dtype, device) if budget is None else budget.pool
        self.lease = None if budget is None else Lease(budget)
        self._pages = session_pages(config.memory)
        self.tables = Tables(config, device)
        self.policy = make_policy(config.memory, ops)
        self.ops = ops
        self.promotions = torch.zeros((), dtype=torch.int64, device=device)
        self.sink = config.memory.kept_sink
        self._near = near_slots(config.memory)
        places = torch.arange(self._near, dtype=torch.int32, device=device)
        self._places, self._moves = places, (places >= self.sink).int()  # all but the sink's go on with the chunk
        self.keep = 1 if isinstance(self.policy, SlowFastPaper) else config.memory.keep
        self.grid, self.eps, self.theta = config.grid, config.model.eps, config.model.theta
        kept = config.precision.pages == "fp8" and config.precision.attention != "fp8"
        self.products = {"wide": True} if kept else {}  # e4m3 pages, products in 16 bits

    @property
    def bytes(self) -> int:
        """Size of its keys and values, fixed for the life of the session; of those that it has set aside for it."""
        return self.pool.bytes if self.lease is None else self.lease.budget.session_bytes

    def open(self) -> None:
        """Take pages for a new session.  Raises CapacityError where there are none, with nothing changed."""
        if self.lease is not None:
            self.lease.open()

    def close(self) -> None:
        """Give its pages back, if they were lent; harmless twice."""
        if self.lease is not None:
            self.lease.close()

    def take_over(self, other: Memory) -> None:
        """Go on as the session of another seat of the same budget, which is free then; no page is copied."""
        self.lease.move(other.lease)
        for name, theirs in other.tables.tensors().items():
            self.tables.tensors()[name].copy_(theirs)
        self.promotions.copy_(other.promotions)

    @property
    def taken(self) -> bool:
        """Whether a session holds pages of a budget here."""
        return self.lease is not None and self.lease.held

    def places(self, layer: int, ids: Tensor) -> Tensor:
        """Where in the pool pages lie that the tables call `ids`."""
        return ids if self.lease is None else self.lease.pages[layer].index_select(0, ids)

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
            q, k, v, *norms, k_pages, v_pages, self.places(layer, table.spare_ids), self.grid,
            eps=self.eps, theta=self.theta, **scales,
        )  # fmt: skip
        self.policy.update(self.tables, layer, key_mean, step)
        if query is None:
            return None
        ids, positions, count = self._read(table, step)
        return self.ops.paged_attention(
            query, k_pages, v_pages, self.places(layer, ids), positions, count, table.q_positions, theta=self.theta,
            **scales, **self.products,
        )  # fmt: skip

    def _read(self, table: LayerTable, step: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """(page_ids, positions, count) of the slots that a pass attends to: all, or the sink and the nearest.

        Slots lie in the order of temporal positions, the chunk in flight last, so the nearest are the last in use; each
        keeps its position. Fixed shapes, and no word to the host.
        """
        if not step.near or self._near == table.page_ids.shape[0]:
            return table.page_ids, table.positions, table.count
        passed = (table.count - self._near).clamp_min(0)
        slots = self._places + passed * self._moves
        shown = (part.index_select(0, slots) for part in (table.page_ids, table.positions))
        return *shown, table.count.clamp_max(self._near)

    def own(self, ids: Tensor | None = None) -> None:
        """Before pages are written: see to it that no other session shows them.  ids: (layers, n), None for all"""
        if self.lease is not None:
            self.lease.own(ids)

    @property
    def device(self) -> torch.device:
        return self.pool.k.device

    def flush(self) -> None:
        """Start a new scene, where the policy knows scenes."""
        if isinstance(self.policy, Window):
            self.policy.flush(self.tables)

    def end_pass(self) -> None:
        """Count the pages promoted in a pass, on the device, and make sure of those that the next one writes."""
        self.promotions += self.keep * (self.tables.stacked.decision[:, 3] > 0).sum()
        self.own(self.tables.stacked.spare_ids)

    def slots_in_use(self, layer: int) -> int:
        """Slots that a layer has written, from the first; a window's sink may be attended beyond them."""
        windowed = isinstance(self.policy, Window)
        return int(self.tables.ends[layer] if windowed else self.tables.layers[layer].count)

    def reset(self) -> None:
        """Forget everything, in place: what a new session finds."""
        self.tables.reset()
        self.promotions.zero_()

    def restart(self) -> None:
        """Forget everything in the middle of a session; pages that a branch shows stay the branch's."""
        self.reset()
        self.own(self.tables.stacked.spare_ids)

    def tensors(self) -> dict[str, Tensor | PageView]:
        """All that it holds, by name."""
        pages = self.pool.tensors()
        if self.lease is not None:
            pages = {name: PageView(tensor, self.lease) for name, tensor in pages.items()}
        return {**pages, **self.tables.tensors(), "promotions": self.promotions}

    def load(self, tensors: dict[str, Tensor | PageView]) -> None:
        """Take over `tensors` of a memory of the same configuration, in place; a page alone is `k.<layer>.<page>`.

        Pages of another session of the same budget are shared, and not copied, until one of the two writes them.
        """
        own = self.tensors()
        for name, theirs in tensors.items():
            if torch.is_tensor(theirs) and torch.is_tensor(own.get(name)):
                own[name].copy_(theirs)
        if self.lease is not None and self.lease.shares_with(tensors.get("k")):
            self.lease.share(tensors["k"].lease)
            self.own(self.tables.stacked.spare_ids)
            return
        self.own()
        own = self.tensors()  # where pages are now
        for name, layer, page, theirs in _by_page(tensors, self.tables.stacked.page_ids.shape[0], self._pages + 1):
            own[name][layer, page].copy_(theirs)

    def misfits(self, tensors: dict[str, Tensor], start: int) -> list[str]:
        """Tables in `tensors` that no memory of this shape has after `start` frames; rules index by what they say."""
        slots, pages = self.tables.stacked.page_ids.shape[1], self._pages + 1
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


def _by_page(tensors: dict[str, Tensor | PageView], layers: int, pages: int) -> Iterator[tuple[str, int, int, Tensor]]:
    """(name, layer, id, page) of what `Memory.load` is given page by page, or as a view of a pool."""
    for name, theirs in tensors.items():
        if isinstance(theirs, PageView):
            for layer, page in itertools.product(range(layers), range(1, pages)):
                yield name, layer, page, theirs[layer, page]
        elif "." in name:
            part, layer, page = name.split(".")
            yield part, int(layer), int(page), theirs


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
