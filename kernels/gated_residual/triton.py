"""Residual add with a gate per latent frame and the norm that follows it, on a GPU, in Triton.

One program a row: x and y are read once, x and its norm written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cfengine.errors import KernelError

from ..modulated_norm.triton import check_rows, empty_normed, norm_pointers, normed, warps
from ..operands import GPU_FLOATS, check_divides, check_size, check_tensor
from ..quantise_rows.triton import converts, store_row

OP = "gated_residual"


@triton.jit
def _rows(
    x, y, gate, shift, scale, out, sizes, x_row, y_row, gate_row, shift_row, scale_row, gate_tokens, norm_tokens,
    dim, eps, GATE: tl.constexpr, NORM: tl.constexpr, FP8: tl.constexpr, HARDWARE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    far = row.to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < dim
    old = tl.load(x + far * x_row + channel, mask=inside, other=0.0)
    update = tl.load(y + far * y_row + channel, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        place = gate + row // gate_tokens * gate_row + channel
        update = update * tl.load(place, mask=inside, other=0.0).to(tl.float32)
    new = (old.to(tl.float32) + update).to(old.dtype)
    tl.store(x + far * x_row + channel, new, mask=inside)
    if NORM:
        frame = row // norm_tokens
        add = tl.load(shift + frame * shift_row + channel, mask=inside, other=0.0).to(tl.float32)
        times = tl.load(scale + frame * scale_row + channel, mask=inside, other=0.0).to(tl.float32)
        result = normed(new.to(tl.float32), add, times, inside, dim, eps)
        if FP8:
            store_row(result, inside, out + far * dim, channel, sizes + row, HARDWARE)
        else:
            tl.store(out + far * dim + channel, result.to(old.dtype), mask=inside)


def gated_residual(x, y, gate=None, shift=None, scale=None, *, eps: float = 1e-6, fp8: bool = False):
    """See `reference.gated_residual`. float32, bfloat16 or float16; rows may be strided."""
    device = x.device.type
    check_tensor(OP, "x", x, 2, GPU_FLOATS, device)
    check_tensor(OP, "y", y, 2, (x.dtype,), device)
    tokens, dim = x.shape
    check_size(OP, "tokens of y", y.shape[0], tokens, "tokens of x")
    check_size(OP, "width of y", y.shape[1], dim, "width of x")
    if gate is not None:
        check_tensor(OP, "gate", gate, 2, GPU_FLOATS, device)
        check_size(OP, "width of gate", gate.shape[1], dim, "width of x")
        check_divides(OP, "tokens of x", tokens, "frames of gate", gate.shape[0])
    if (shift is None) != (scale is None):
        raise KernelError(f"{OP}: shift and scale are given together or not at all; pass both for the norm")
    out = None
    if shift is not None:
        check_rows(OP, x, shift, scale)
        out = empty_normed(x, fp8)
    gates = x if gate is None else gate  # an unread pointer where there is no gate or norm
    adds, factors = (x, x) if shift is None else (shift, scale)
    norms, sizes = (x, x) if out is None else norm_pointers(out, fp8)
    width = triton.next_power_of_2(dim)
    _rows[(tokens,)](
        x, y, gates, adds, factors, norms, sizes, x.stride(0), y.stride(0), gates.stride(0), adds.stride(0),
        factors.stride(0), tokens // gates.shape[0], tokens // adds.shape[0], dim, eps, GATE=gate is not None,
        NORM=shift is not None, FP8=fp8, HARDWARE=converts(x.device), WIDTH=width, num_warps=warps(width),
    )  # fmt: skip
    return x, out
