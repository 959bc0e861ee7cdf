"""A session's memory: pages, tables and rule, and the attention that reads them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.memory.pages import PagePool, Tables
from cfengine.memory.policies import Pass, Window, make_policy
from cfengine.ops import Ops


class Memory:
    """A session's pages, tables and rule, and the attention that reads them."""

    def __init__(self, config: EngineConfig, ops: Ops, dtype, device="cpu") -> None:
        self.pool = PagePool(config, dtype, device)
        self.tables = Tables(config, device)
        self.policy = make_policy(config.memory, ops)
        self.ops = ops
        self.promotions = torch.zeros((), dtype=torch.int64, device=device)
        self.sink = config.memory.kept_sink
        self.keep = 1 if config.memory.policy == "slow_fast_paper" else config.memory.keep
        self.grid, self.eps, self.theta = config.grid, config.model.eps, config.model.theta

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
        k_pages, v_pages = self.pool.k[layer], self.pool.v[layer]
        query, key_mean = self.ops.qk_norm_rope_store(
            q, k, v, *norms, k_pages, v_pages, table.spare_ids, self.grid, eps=self.eps, theta=self.theta
        )
        self.policy.update(self.tables, layer, key_mean, step)
        if query is None:
            return None
        return self.ops.paged_attention(
            query, k_pages, v_pages, table.page_ids, table.positions, table.count, table.q_positions, theta=self.theta
        )

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

    def snapshot_events(self) -> tuple[int, np.ndarray]:
        """A point to count events from: promotions so far, and which latent frames the tables show."""
        return int(self.promotions), self._shown()

    def events_since(self, before: tuple[int, np.ndarray]) -> tuple[int, int]:
        """(promotions, evictions) since `before`, summed over layers; an eviction is a frame no slot shows any more."""
        promotions, shown = before
        return int(self.promotions) - promotions, int(np.setdiff1d(shown, self._shown()).size)

    def _shown(self) -> np.ndarray:
        """Sorted (layer, source frame) pairs as single integers."""
        sources = self.tables.stacked.sources.cpu().numpy().astype(np.int64)
        counts = self.tables.stacked.count.cpu().numpy()
        used = (sources >= 0) & (np.arange(sources.shape[1]) < counts)
        return np.unique((sources + (np.arange(len(sources))[:, None] << 40))[used])
