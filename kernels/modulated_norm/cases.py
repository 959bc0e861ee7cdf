"""Inputs, shapes and tolerances of the modulated norm."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    frames: int
    page_tokens: int
    dim: int


SHAPES = (
    Shape(3, 24, 192),  # tiny-world
    Shape(1, 96, 1536),  # Wan 2.1, one modulation for all tokens
    Shape(3, 7, 35),  # odd: no whole vector divides the width
)

# Largest error over largest reference value. float32: a mean and a variance over dim values, a few units of 2^-24 for
# widths of 16 and more (two values can be equal but for rounding, and their variance with them).
# bfloat16: the output is rounded to 8 bits (2^-9 relative); the arithmetic between is float32.
# float16 keeps three bits more than bfloat16; half of that gain is asked for.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def make(shape: Shape, dtype: torch.dtype, seed: int = 0):
    """Return x, shift, scale; x has a mean, as activations do; both factors are views of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    frames, page_tokens, dim = shape
    x = torch.randn(frames * page_tokens, dim, generator=generator) * 3 + 5
    modulation = torch.randn(frames, 2, dim, generator=generator)
    return x.to(dtype), modulation[:, 0].to(dtype), modulation[:, 1].to(dtype)
