"""Segments in torch: `first`, `middle(i)`, `last`, the signature that every backend shares."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cfengine.model.dit import CausalDiT, CrossCache, Modulation
from cfengine.ops import Ops

Projected = tuple[Tensor | None, Tensor, Tensor]


class TorchSegments:
    """pre(0);  post(i) + pre(i + 1);  post(last) + head.  Tokens of one chunk, x updated in place."""

    def __init__(self, model: CausalDiT, ops: Ops, grid: tuple[int, int]) -> None:
        self.model, self.ops, self.grid = model, ops, grid
        self.layers = len(model.blocks)

    def norms(self, layer: int) -> tuple[Tensor, Tensor]:
        """Weights of the query and key norm of a layer, (dim,) each."""
        attention = self.model.blocks[layer].self_attn
        return attention.norm_q.weight, attention.norm_k.weight

    def first(
        self, latents: Tensor, modulation: Modulation, *, keys_only: bool = False, observe=None
    ) -> tuple[Tensor, Projected]:
        """Latents (frames, channels, height, width) to tokens and the first block's q, k, v."""
        x = self.model.embed(latents)
        if observe:
            observe("patch_embedding", x)
        shift, scale = modulation.blocks[0][:2]
        block = self.model.blocks[0]
        normed = self.ops.modulated_norm(x, shift, scale, eps=block.eps, fp8="self_attn.qkv" in block.fp8)
        return x, block.pre_attention(self.ops, normed, keys_only=keys_only)

    def middle(
        self,
        layer: int,
        x: Tensor,
        attended: Tensor,
        modulation: Modulation,
        cross: CrossCache,
        *,
        keys_only: bool = False,
        observe=None,
    ) -> tuple[Tensor, Projected]:
        """Second half of `layer` and first half of the next."""
        after = tuple(modulation.blocks[layer + 1][:2])
        x, normed = self.model.blocks[layer].post_attention(
            self.ops, x, attended, modulation.blocks[layer], cross, after, _inside(observe, layer)
        )
        return x, self.model.blocks[layer + 1].pre_attention(self.ops, normed, keys_only=keys_only)

    def last(self, x: Tensor, attended: Tensor, modulation: Modulation, cross: CrossCache, *, observe=None) -> Tensor:
        """Second half of the last block, and the head: flow (frames, channels, height, width)."""
        layer = self.layers - 1
        _, normed = self.model.blocks[layer].post_attention(
            self.ops, x, attended, modulation.blocks[layer], cross, tuple(modulation.head), _inside(observe, layer)
        )
        head = self.model.head.head
        return self.model.unpatchify(F.linear(normed, head.weight, head.bias), self.grid)


def _inside(observe, layer: int):
    """Prefix what a block reports with its number."""
    if observe is None:
        return None
    return lambda name, value: observe(f"block{layer}.{name}".rstrip("."), value)
