"""Inputs, shapes and tolerances of the e4m3 linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..quantise_rows.reference import quantise_rows


class Shape(NamedTuple):
    tokens: int
    wide: int  # input channels
    out: int


SHAPES = (
    Shape(72, 192, 576),  # tiny-world, q, k and v side by side
    Shape(96, 1536, 4608),  # Wan 2.1
    Shape(33, 8960, 1536),  # Wan 2.1, second half of the feed-forward, with a number of rows that no tile divides
    Shape(1, 16, 16),  # smallest that the library takes
)

# Largest error over largest reference value: bfloat16 rounds the result to 8 bits (2^-9), and tensor cores of Hopper
# add e4m3 products with fewer bits than float32 between two promotions (a few units of 2^-13).
TOLERANCE = 4e-3


def make(shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    """Return rows, scale, weight, weight_scale, bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.tokens, shape.wide, generator=generator) * torch.logspace(-1, 1, shape.tokens)[:, None]
    weight = torch.randn(shape.out, shape.wide, generator=generator) / shape.wide**0.5
    bias = torch.randn(shape.out, generator=generator).to(dtype)
    return *quantise_rows(x), *quantise_rows(weight), bias
