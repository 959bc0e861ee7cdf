"""Residual add with a gate, fused with the norm that follows it, on the CPU, compiled."""

from __future__ import annotations

import torch

from cfengine import _C
from cfengine.errors import KernelError

from ..operands import FLOATS, check_divides, check_size, check_tensor, float_rows, refuse_fp8

OP = "gated_residual"


def gated_residual(x, y, gate=None, shift=None, scale=None, *, eps: float = 1e-6, fp8: bool = False):
    """See `reference.gated_residual`. float32 or bfloat16, rows may be strided; x is updated in place."""
    refuse_fp8(OP, fp8)
    check_tensor(OP, "x", x, 2, FLOATS)
    check_tensor(OP, "y", y, 2, (x.dtype,))
    tokens, dim = x.shape
    check_size(OP, "tokens of y", y.shape[0], tokens, "tokens of x")
    check_size(OP, "width of y", y.shape[1], dim, "width of x")
    if (shift is None) != (scale is None):
        given, missing = ("scale", "shift") if shift is None else ("shift", "scale")
        raise KernelError(f"{OP}: {given} is given without {missing}; pass 2 of them for the norm, or 0")
    gate_operand, gate_frames = (0, 0), 1
    if gate is not None:
        gate = float_rows(OP, "gate", gate, dim)
        gate_operand, gate_frames = (gate.data_ptr(), gate.stride(0)), gate.shape[0]
        check_divides(OP, "tokens of x", tokens, "frames of gate", gate_frames)
    normed, norm_operands, norm_frames = None, (0, 0, 0, 0), 1
    if shift is not None:
        shift, scale = float_rows(OP, "shift", shift, dim), float_rows(OP, "scale", scale, dim)
        norm_operands = (shift.data_ptr(), shift.stride(0), scale.data_ptr(), scale.stride(0))
        norm_frames = shift.shape[0]
        check_size(OP, "frames of scale", scale.shape[0], norm_frames, "frames of shift")
        check_divides(OP, "tokens of x", tokens, "frames of shift", norm_frames)
        normed = torch.empty((tokens, dim), dtype=x.dtype)
    _C.gated_residual(
        x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), *gate_operand, gate_frames, *norm_operands, norm_frames,
        0 if normed is None else normed.data_ptr(), dim, tokens, dim, eps, x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )  # fmt: skip
    return x, normed
