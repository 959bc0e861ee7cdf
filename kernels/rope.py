"""Rotary position tables, shared by every operation that rotates.

Channels of a head are interleaved pairs (2i, 2i+1): first the temporal pairs, then row pairs, then column pairs
(Wan 2.1, `wan/modules/model.py`, `rope_apply`). Pair i of an axis with m pairs turns by position * theta^(-i/m).
Angles are computed in float64.
"""

from __future__ import annotations

from functools import lru_cache

import torch


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs that belong to time, rows and columns, in channel order."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def axis_frequencies(pairs: int, theta: float = 10000.0) -> torch.Tensor:
    """(pairs,) float64 turning rates, radians per position."""
    return theta ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))


@lru_cache(maxsize=32)
def spatial_table(rows: int, columns: int, head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """(rows * columns, row pairs + column pairs, 2) float32: cosine and sine of every spatial pair of every token."""
    _, row_pairs, column_pairs = axis_pairs(head_dim)
    row = torch.arange(rows, dtype=torch.float64)[:, None] * axis_frequencies(row_pairs, theta)
    column = torch.arange(columns, dtype=torch.float64)[:, None] * axis_frequencies(column_pairs, theta)
    angle = torch.cat(
        [row[:, None].expand(rows, columns, row_pairs), column[None].expand(rows, columns, column_pairs)], dim=-1
    ).reshape(rows * columns, -1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def rotate(x: torch.Tensor, angle: torch.Tensor, first_pair: int) -> torch.Tensor:
    """Turn pairs `first_pair ... first_pair + n` of the last axis of x by `angle` (broadcastable to (..., n)).

    Computed in float32 (float64 for float64 input) and cast back to x's type.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cosine, sine = angle.cos().to(wide), angle.sin().to(wide)
    pairs = x.to(wide).unflatten(-1, (-1, 2))
    span = slice(first_pair, first_pair + angle.shape[-1])
    even, odd = pairs[..., span, 0], pairs[..., span, 1]
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    shape = (*turned.shape[:-2], -1, 2)
    parts = [pairs[..., : span.start, :].expand(shape), turned, pairs[..., span.stop :, :].expand(shape)]
    return torch.cat(parts, dim=-2).flatten(-2).to(x.dtype)
