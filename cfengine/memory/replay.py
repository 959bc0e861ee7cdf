"""Writing again what pages hold: clean passes over kept latents, under a table that stays as it is."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass, Window


class Replay:
    """A memory's pages to clean passes that compute them anew, chunk after chunk in the order of time.

    A chunk's pages are written where the tables have them, and it attends, as it did when it came, to itself and to
    pages of earlier chunks, which are new by then; positions are those that the tables show now. Layers may differ:
    where one shows some frames of a chunk, or none, the others are written to its spare pages, which nothing shows, at
    the positions next to those shown or after the latest page before them. A frame in two slots has one page
    afterwards. What the rules compare, the mean key of the latest chunk and the descriptors of pages, is new too.
    """

    def __init__(self, memory: Memory, starts: Collection[int]) -> None:
        """starts: first frames of the chunks whose latents are kept; pages of other chunks stay as they are.

        The host reads the tables, and so waits for what is queued.
        """
        self._memory, self._frames = memory, memory.tables.stacked.spare_ids.shape[1]
        stacked = memory.tables.stacked
        read = stacked.page_ids, stacked.positions, stacked.sources, stacked.count, stacked.spare_ids
        self._ids, self._positions, sources, counts, self._spares = (
            tensor.to("cpu", copy=True).numpy() for tensor in read
        )
        self._sources = np.where(np.arange(sources.shape[1]) < counts, sources, -1)
        shown = np.unique(self._sources[self._sources >= 0] // self._frames * self._frames)
        self.starts = [int(start) for start in shown if int(start) in starts]
        for ids, row in zip(self._ids, self._sources, strict=True):
            for slot, source in enumerate(row):
                if source // self._frames * self._frames in self.starts:
                    ids[slot] = ids[_last(row, source)]
        stacked.page_ids.copy_(torch.from_numpy(self._ids))

    @property
    def device(self) -> torch.device:
        return self._memory.device

    def begin(self, start: int) -> None:
        """Say which chunk the next pass computes; start: its first frame."""
        rows = [self._row(layer, start) for layer in range(len(self._ids))]
        stacked = (torch.from_numpy(np.array(part, np.int32)).to(self.device) for part in zip(*rows, strict=True))
        self._page_ids, self._at, self._count, self._q_at, self._written = stacked
        self._memory.own(self._written)

    def _row(self, layer: int, start: int) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """(page_ids, positions, count, q_positions, pages to write) of one layer, as `LayerTable` has them."""
        ids, positions, sources = self._ids[layer], self._positions[layer], self._sources[layer]
        older = np.flatnonzero((sources >= 0) & (sources < start))
        slots = [_last(sources, start + i) for i in range(self._frames)]
        first = next((i for i, slot in enumerate(slots) if slot is not None), None)
        if first is None:
            before = int(positions[older].max()) + 1 if older.size else 0
        else:
            before = int(positions[slots[first]]) - first
        at = [max(0, before + i) if slot is None else int(positions[slot]) for i, slot in enumerate(slots)]
        written = [int(self._spares[layer][i] if slot is None else ids[slot]) for i, slot in enumerate(slots)]
        count = len(older) + self._frames
        padding = [0] * (len(ids) - count)  # the newest chunk is shown by all layers, so there is room
        return [*ids[older], *written, *padding], [*positions[older], *at, *padding], [count], at, written

    def attend(
        self, layer: int, q: Tensor | None, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor], step: Pass
    ) -> Tensor | None:
        """See `Memory.attend`."""
        memory, table, written = self._memory, self._memory.tables.layers[layer], self._written[layer]
        k_pages, v_pages, scales = memory.pool.k[layer], memory.pool.v[layer], memory.pool.scales(layer)
        query, key_mean = memory.ops.qk_norm_rope_store(
            q, k, v, *norms, k_pages, v_pages, memory.places(layer, written), memory.grid,
            eps=memory.eps, theta=memory.theta, **scales,
        )  # fmt: skip
        if not isinstance(memory.policy, Window):  # which compares nothing
            table.last_key.copy_(key_mean)
        if memory.tables.descriptors.shape[1]:
            memory.tables.descriptors[layer][written.long()] = key_mean
        if query is None:
            return None
        ids = memory.places(layer, self._page_ids[layer])
        shown = ids, self._at[layer], self._count[layer], self._q_at[layer]
        return memory.ops.paged_attention(
            query, k_pages, v_pages, *shown, theta=memory.theta, **scales, **memory.products
        )

    def end_pass(self) -> None:
        """Nothing is promoted."""


def _last(sources: np.ndarray, source: int) -> int | None:
    """The last slot that shows a frame."""
    found = np.flatnonzero(sources == source)
    return int(found[-1]) if found.size else None
