"""Inputs, shapes and tolerances of the gated residual."""

from __future__ import annotations

import torch

from ..modulated_norm.cases import SHAPES, Shape

__all__ = ["SHAPES", "TOLERANCE", "Shape", "make"]

# Largest error over largest reference value. float32: one product and one sum, then a norm. bfloat16: the sum is
# rounded to 8 bits on both sides; where the two round a tie differently (2^-8), the norm sees a value one step away.
# float16 keeps three bits more than bfloat16; half of that gain is asked for.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2.5e-3}


def make(shape: Shape, dtype: torch.dtype, seed: int = 0):
    """Return x, y, gate, shift, scale."""
    generator = torch.Generator().manual_seed(seed)
    frames, page_tokens, dim = shape
    x, y = torch.randn(2, frames * page_tokens, dim, generator=generator)
    gate, shift, scale = torch.randn(3, frames, dim, generator=generator)
    return tuple(t.to(dtype) for t in (x + 2, y, gate, shift, scale))
