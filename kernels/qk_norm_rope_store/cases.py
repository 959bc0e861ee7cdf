"""Inputs, shapes and tolerances of the page writer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..paged_attention.cases import narrow


class Shape(NamedTuple):
    grid: tuple[int, int]
    frames: int
    heads: int
    head_dim: int


SHAPES = (
    Shape((4, 6), 3, 6, 32),  # tiny-world
    Shape((10, 13), 1, 3, 128),  # head size of Wan 2.1
    Shape((3, 3), 2, 3, 22),  # odd: head size that no vector divides
    Shape((1, 1), 1, 1, 2),  # smallest: no spatial pair at all
)

# Largest error over largest reference value. float32: one mean of squares, one rotation by a float32 table.
# bfloat16: the normed row and the rotated one are each rounded to 8 bits, and the first rounding may fall either way.
# float16 keeps three bits more than bfloat16; half of that gain is asked for.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2.5e-3}
# The mean sums `tokens` keys in float64. float32: a rounding of the result. bfloat16: its terms carry 2^-9 each.
MEAN_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def make(shape: Shape, dtype: torch.dtype, seed: int = 0):
    """Return q, k, v (slices of one projection), both norms, zero pages, page ids and the grid."""
    generator = torch.Generator().manual_seed(seed)
    (rows, columns), frames, heads, head_dim = shape
    dim, pool = heads * head_dim, frames + 2
    q, k, v = torch.randn(frames * rows * columns, 3 * dim, generator=generator).to(dtype).split(dim, dim=1)
    norm_q, norm_k = (1 + 0.1 * torch.randn(2, dim, generator=generator)).to(dtype)
    k_pages, v_pages = torch.zeros(2, pool, rows * columns, heads, head_dim, dtype=dtype)
    page_ids = torch.randperm(pool, generator=generator)[:frames].int()
    return q, k + 0.5, v, norm_q, norm_k, k_pages, v_pages, page_ids, (rows, columns)


def make_narrow(shape: Shape, dtype: torch.dtype, seed: int = 0):
    """Return the operands of `make`, the same with zero pages in e4m3, and the scales of those by name."""
    operands = make(shape, dtype, seed)
    pages = [page.float().clone() for page in operands[5:7]]
    k_pages, v_pages, scales = narrow(*pages)
    for scale in scales.values():
        scale.fill_(1)
    return operands, (*operands[:5], k_pages, v_pages, *operands[7:]), scales
