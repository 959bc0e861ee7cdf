"""Page storage and the per-layer tables that show it."""

from __future__ import annotations

import torch

from cfengine.config import EngineConfig
from cfengine.kernels.slow_fast_update.reference import SlowFastTable as LayerTable

__all__ = ["LayerTable", "PagePool", "Tables"]


class PagePool:
    """Keys and values of one session: one page per latent frame and layer, allocated once.

    k, v: (layers, pages, page_tokens, heads, head_dim).  pages = slots + chunk_frames + 1: what the tables can show,
    the pages that the pass in flight writes, and page 0, which stays zero and stands for a slot never written.
    """

    def __init__(self, config: EngineConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        model, memory = config.model, config.memory
        shape = (model.layers, memory.slots + memory.chunk_frames + 1, config.page_tokens, model.heads, model.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()


class Tables:
    """One LayerTable per layer, as rows of stacked tensors, so that a host copy of all layers is one copy."""

    def __init__(self, config: EngineConfig, device: torch.device | str = "cpu") -> None:
        layers, memory = config.model.layers, config.memory
        frames, slots = memory.chunk_frames, memory.slots

        def integers(width: int, fill: int = 0) -> torch.Tensor:
            return torch.full((layers, width), fill, dtype=torch.int32, device=device)

        self.stacked = LayerTable(
            page_ids=integers(slots),
            positions=integers(slots),
            sources=integers(slots, -1),
            count=integers(1),
            q_positions=integers(frames),
            spare_ids=integers(frames),
            promoted=integers(1),
            seen=integers(1),
            last_key=torch.zeros(layers, config.model.dim, device=device),
            decision=integers(5),
            similarity=torch.full((layers, 1), float("nan"), device=device),
        )
        self.stacked.spare_ids.copy_(torch.arange(1, frames + 1, dtype=torch.int32))
        self.ends = integers(1)  # windows: slots written, which LongLive's attended sink may exceed
        self.marked = integers(slots)  # slow_fast_paper: 1 where the page will join slow memory
        self.layers = [LayerTable(*(tensor[layer] for tensor in self.stacked)) for layer in range(layers)]
