"""Inputs, shapes and tolerances of paged attention."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
