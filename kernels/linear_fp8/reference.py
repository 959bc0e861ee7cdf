"""Linear layer on e4m3 operands: one scale a token, one scale an output channel."""

from __future__ import annotations

import torch


def linear_fp8(rows, scale, weight, weight_scale, bias=None, *, dtype=torch.bfloat16):
    """out = (rows * scale) (weight * weight_scale)^T + bias

    rows: (tokens, in) e4m3      scale: (tokens,) float32      weight: (out, in) e4m3      weight_scale: (out,) float32
    bias: (out,) or None  ->  (tokens, out) in `dtype`; products and sums in float32 (float64 where scale is float64)
    """
    wide = scale.dtype
    out = rows.to(wide) @ weight.to(wide).T * scale[:, None] * weight_scale.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)
