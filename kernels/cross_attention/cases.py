"""Inputs, shapes and tolerances of cross-attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    tokens: int
    keys: int
    live: int  # keys before the padding of bias -inf
    heads: int
    head_dim: int


SHAPES = (
    Shape(72, 16, 16, 6, 32),  # tiny-world, a prompt that fills its length
    Shape(130, 512, 100, 2, 128),  # Wan 2.1: a paragraph, padded
    Shape(64, 96, 64, 1, 64),  # the padding begins with a tile
    Shape(37, 13, 5, 3, 22),  # odd: tokens, keys and channels all leave remainders
    Shape(1, 1, 1, 1, 2),  # smallest
)

# Largest error over largest reference value, as for paged attention, whose sums are longer.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 4e-3}


def make(shape: Shape, dtype: torch.dtype, seed: int = 0):
    """Return the operands of `cross_attention`; the last live key stands for many, as a prompt's padding does."""
    generator = torch.Generator().manual_seed(seed)
    tokens, keys, live, heads, head_dim = shape

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    bias = torch.full((keys,), float("-inf"))
    bias[:live] = 0.0
    bias[live - 1] = math.log(7.0)
    return normal(tokens, heads, head_dim), normal(keys, heads, head_dim), normal(keys, heads, head_dim), bias
