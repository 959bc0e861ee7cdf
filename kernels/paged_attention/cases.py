"""Inputs, shapes and tolerances of paged attention."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..fp8 import quantise


class Shape(NamedTuple):
    page_tokens: int
    frames: int
    slots: int
    heads: int
    head_dim: int


SHAPES = (
    Shape(24, 3, 21, 6, 32),  # tiny-world
    Shape(390, 3, 4, 2, 64),  # pages longer than a tile of keys
    Shape(390, 1, 4, 10, 64),  # more heads than are packed at a time
    Shape(130, 1, 3, 1, 128),  # head size of Wan 2.1
    Shape(9, 3, 5, 2, 22),  # odd: tokens, keys and channels all leave remainders
    Shape(1, 1, 1, 1, 2),  # smallest
)

# Largest error over largest reference value. float32: a score sums head_dim products, the output sums thousands of
# keys, each sum within a few units of 2^-24; measured below 2.5e-6. bfloat16: keys, queries, softmax weights and the
# output are each rounded once more than in the float64 reference (2^-9 relative each); measured below 6e-3.
# float16 keeps three bits more than bfloat16; half of that gain is asked for.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 4e-3}
# Pages in e4m3, the same for kernel and reference: root of the mean squared error over that of the reference. Products
# in float16: as above. In e4m3: a weight and a channel of a query are each off by up to 2^-4, at random, less than
# 2^-4 / sqrt(3) in the mean; errors of weights average over the keys as values do, those of queries move the scores.
HALF_TOLERANCE, FP8_TOLERANCE = 1e-3, 5e-2


def make(shape: Shape, dtype: torch.dtype, seed: int = 0, first_position: int = 0, unused: int = 0):
    """Return the operands of `paged_attention`; the last `unused` slots lie beyond `count`."""
    generator = torch.Generator().manual_seed(seed)
    page_tokens, frames, slots, heads, head_dim = shape
    pool = slots + frames + 1

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    return (
        normal(frames * page_tokens, heads, head_dim),
        normal(pool, page_tokens, heads, head_dim),
        normal(pool, page_tokens, heads, head_dim),
        torch.randperm(pool, generator=generator)[:slots].int(),
        (first_position + torch.arange(slots)).int(),
        torch.tensor([slots - unused], dtype=torch.int32),
        (first_position + slots - frames + torch.arange(frames)).int(),
    )


def narrow(k_pages, v_pages):
    """Return pages rounded to e4m3, values with their tokens adjacent (padded to 32), and their scales by name."""
    (k, k_scale), (v, v_scale) = (quantise(pages, (1, 3)) for pages in (k_pages, v_pages))
    tokens = v.shape[1]
    stored = torch.zeros(*v.shape[:1], *v.shape[2:], -(-tokens // 32) * 32).to(v.dtype)
    stored[..., :tokens].copy_(v.permute(0, 2, 3, 1))
    scales = {"k_scale": k_scale[:, 0, :, 0].contiguous(), "v_scale": v_scale[:, 0, :, 0].contiguous()}
    return k, stored[..., :tokens].permute(0, 3, 1, 2), scales
