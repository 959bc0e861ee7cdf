"""Rows of activations, or of a weight matrix, in e4m3 with one scale a row."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..fp8 import quantise


class Rows(NamedTuple):
    """values (tokens, dim) e4m3 and scale (tokens,): row i is values[i] * scale[i]."""

    values: torch.Tensor
    scale: torch.Tensor


def quantise_rows(x, *, gelu: bool = False) -> Rows:
    """values = e4m3(y * 448 / max|y|),  scale = max|y| / 448 of each row, with y = x or, where `gelu` is set, gelu(x).

    gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), computed in float32 and not rounded in between.

    x: (tokens, dim), rows may be strided  ->  values (tokens, dim) e4m3, scale (tokens,) float32 (float64 for float64)
    """
    if gelu:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        x = torch.nn.functional.gelu(wide, approximate="tanh")
    values, scale = quantise(x)
    return Rows(values, scale[:, 0])
