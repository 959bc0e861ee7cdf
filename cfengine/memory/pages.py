"""Page storage and the per-layer tables that show it."""

from __future__ import annotations

import torch

from cfengine.config import EngineConfig, MemoryConfig
from cfengine.kernels.slow_fast_update.reference import SlowFastTable as LayerTable

__all__ = ["LayerTable", "PagePool", "Tables", "near_slots", "session_pages"]


def session_pages(memory: MemoryConfig) -> int:
    """Pages of a layer that a session needs at most: what its slots show, and what the pass in flight writes."""
    return memory.slots + memory.chunk_frames


def near_slots(memory: MemoryConfig) -> int:
    """Slots that a pass reads which looks near alone: half of them, and no less than the sink and two chunks.

    Half is rounded up to whole chunks. The two chunks are the one in flight and the one that it follows.
    """
    frames = memory.chunk_frames
    half = -(-memory.slots // (2 * frames)) * frames
    return min(memory.slots, max(half, memory.kept_sink + 2 * frames))


class PagePool:
    """Keys and values, one page per latent frame and layer, allocated once: of one session, or of several.

    k, v: (layers, pages, page_tokens, heads, head_dim).  pages = sessions * `session_pages` + 1; page 0 stays zero and
    stands for a slot never written. Of several sessions, `Budget` says whose pages the others are.

    In e4m3 (`PrecisionConfig.pages`) a key is k * k_scale[layer, page, head], and a value likewise; k_scale, v_scale:
    (layers, pages, heads) float32, else None. Products on fp8 tensor cores want both operands contiguous along the sum,
    so v is then a view whose tokens lie side by side, padded to a multiple of 32 with zeros.
    """

    def __init__(
        self, config: EngineConfig, dtype: torch.dtype, device: torch.device | str = "cpu", sessions: int = 1
    ) -> None:
        model, count = config.model, sessions * session_pages(config.memory) + 1
        shape = (model.layers, count, config.page_tokens, model.heads, model.head_dim)
        if config.precision.pages != "fp8":
            self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.k_scale = self.v_scale = None
            return
        layers, pages, tokens, heads, head_dim = shape
        padded = (layers, pages, heads, head_dim, -(-tokens // 32) * 32)
        self.k = torch.zeros(shape, dtype=torch.float8_e4m3fn, device=device)
        self.v = torch.zeros(padded, dtype=torch.float8_e4m3fn, device=device)[..., :tokens].permute(0, 1, 4, 2, 3)
        self.k_scale, self.v_scale = (torch.ones(layers, pages, heads, device=device) for _ in range(2))

    def scales(self, layer: int) -> dict[str, torch.Tensor]:
        """Scales of a layer's pages as operations take them: k_scale, v_scale (pages, heads), or nothing."""
        if self.k_scale is None:
            return {}
        return {"k_scale": self.k_scale[layer], "v_scale": self.v_scale[layer]}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that pages hold, by name."""
        named = {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def clear_zero(self) -> None:
        """Make page 0 zero again, where passes of no session have written (`Budget`)."""
        for name, tensor in self.tensors().items():
            page = tensor[:, 0]
            page.fill_(1.0) if name.endswith("scale") else page.zero_()

    @property
    def bytes(self) -> int:
        """Size of all pages, scales included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors().values())

    @property
    def page_bytes(self) -> int:
        """Size of one page, that is of one latent frame in one layer."""
        return self.bytes // (self.k.shape[0] * self.k.shape[1])


class Tables:
    """One LayerTable per layer, as rows of stacked tensors, so that a host copy of all layers is one copy."""

    def __init__(self, config: EngineConfig, device: torch.device | str = "cpu") -> None:
        layers, memory = config.model.layers, config.memory
        frames, slots = memory.chunk_frames, memory.slots

        def integers(width: int) -> torch.Tensor:
            return torch.empty((layers, width), dtype=torch.int32, device=device)

        self.stacked = LayerTable(
            page_ids=integers(slots),
            positions=integers(slots),
            sources=integers(slots),
            count=integers(1),
            q_positions=integers(frames),
            spare_ids=integers(frames),
            promoted=integers(1),
            seen=integers(1),
            last_key=torch.empty(layers, config.model.dim, device=device),
            decision=integers(5),
            similarity=torch.empty(layers, 1, device=device),
        )
        self.ends = integers(1)  # windows: slots written, which LongLive's attended sink may exceed
        self.marked = integers(slots)  # slow_fast_paper, slow_fast_diverse: 1 where the page will join slow memory
        described = slots + frames + 1 if memory.policy == "slow_fast_diverse" else 0
        # slow_fast_diverse: what a page is like, by page id; a row of zeros is like nothing
        self.descriptors = torch.empty(layers, described, config.model.dim, device=device)
        self.layers = [LayerTable(*(tensor[layer] for tensor in self.stacked)) for layer in range(layers)]
        self.reset()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a table says, for all layers, by name."""
        more = {"ends": self.ends, "marked": self.marked, "descriptors": self.descriptors}
        return {**self.stacked._asdict(), **more}

    def reset(self) -> None:
        """Forget everything, in place."""
        for tensor in self.tensors().values():
            tensor.zero_()
        self.stacked.sources.fill_(-1)
        self.stacked.similarity.fill_(float("nan"))
        frames = self.stacked.spare_ids.shape[1]
        self.stacked.spare_ids.copy_(torch.arange(1, frames + 1, dtype=torch.int32))
