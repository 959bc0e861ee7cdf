"""Inputs and shapes of rows in e4m3, and how far two roundings of them may lie apart."""

from __future__ import annotations

import torch

# tokens, dim: tiny-world, Wan 2.1 (model, feed-forward), odd, smallest
SHAPES = ((72, 192), (33, 1536), (8, 8960), (5, 35), (1, 1))


def make(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return rows of very different sizes, a row of zeros among them where there are two."""
    generator = torch.Generator().manual_seed(seed)
    tokens, dim = shape
    x = torch.randn(tokens, dim, generator=generator) * torch.logspace(-3, 2, tokens)[:, None]
    x[1:2] = 0
    return x.to(dtype)


def steps(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many e4m3 numbers lie between two e4m3 tensors, element by element."""

    def order(values):
        bits = values.contiguous().view(torch.uint8).int()
        return torch.where(bits >= 128, 128 - bits, bits)

    return (order(found) - order(expected)).abs()
