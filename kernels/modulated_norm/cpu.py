"""Layer norm with scale and shift per latent frame on the CPU, compiled."""

from __future__ import annotations

import torch

from cfengine import _C

from ..operands import FLOATS, check_divides, check_size, check_tensor, float_rows, refuse_fp8

OP = "modulated_norm"


def modulated_norm(x, shift, scale, *, eps: float = 1e-6, fp8: bool = False):
    """See `reference.modulated_norm`. float32 or bfloat16, rows of x may be strided."""
    refuse_fp8(OP, fp8)
    check_tensor(OP, "x", x, 2, FLOATS)
    tokens, dim = x.shape
    shift, scale = float_rows(OP, "shift", shift, dim), float_rows(OP, "scale", scale, dim)
    check_size(OP, "frames of scale", scale.shape[0], shift.shape[0], "frames of shift")
    check_divides(OP, "tokens of x", tokens, "frames of shift", shift.shape[0])
    out = torch.empty((tokens, dim), dtype=x.dtype)
    _C.modulated_norm(
        x.data_ptr(), x.stride(0), shift.data_ptr(), shift.stride(0), scale.data_ptr(), scale.stride(0), out.data_ptr(),
        dim, tokens, shift.shape[0], dim, eps, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out
