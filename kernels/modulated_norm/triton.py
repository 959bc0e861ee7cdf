"""Layer norm with scale and shift per latent frame on a GPU, in Triton.

One program a row: the row stays in registers between its two sums and the result, so it is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..operands import GPU_FLOATS, check_divides, check_size, check_tensor

OP = "modulated_norm"


@triton.jit
def normed(x, shift, scale, inside, dim, eps):
    """(x - mean) / sqrt(var + eps) * (1 + scale) + shift of one row in float32; x is zero where not `inside`."""
    mean = tl.sum(x, 0) / dim
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / dim
    return centred * (1.0 / tl.sqrt(variance + eps)) * (1.0 + scale) + shift


@triton.jit
def _rows(
    x, shift, scale, out, x_row, shift_row, scale_row, out_row, frame_tokens, dim, eps, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    inside = channel < dim
    frame = row // frame_tokens
    value = tl.load(x + row.to(tl.int64) * x_row + channel, mask=inside, other=0.0)
    add = tl.load(shift + frame * shift_row + channel, mask=inside, other=0.0).to(tl.float32)
    times = tl.load(scale + frame * scale_row + channel, mask=inside, other=0.0).to(tl.float32)
    result = normed(value.to(tl.float32), add, times, inside, dim, eps)
    tl.store(out + row.to(tl.int64) * out_row + channel, result.to(value.dtype), mask=inside)


def warps(width: int) -> int:
    """Warps of a program that holds one row: 8 values a thread, at most 8 warps."""
    return max(1, min(8, width // 256))


def check_rows(op: str, x, shift, scale) -> None:
    """Raise KernelError unless x (tokens, dim), shift and scale (frames, dim) belong together on one device."""
    tokens, dim = x.shape
    for name, factor in (("shift", shift), ("scale", scale)):
        check_tensor(op, name, factor, 2, GPU_FLOATS, x.device.type)
        check_size(op, f"width of {name}", factor.shape[1], dim, "width of x")
    check_size(op, "frames of scale", scale.shape[0], shift.shape[0], "frames of shift")
    check_divides(op, "tokens of x", tokens, "frames of shift", shift.shape[0])


def modulated_norm(x, shift, scale, *, eps: float = 1e-6):
    """See `reference.modulated_norm`. float32, bfloat16 or float16, rows of x may be strided."""
    check_tensor(OP, "x", x, 2, GPU_FLOATS, x.device.type)
    check_rows(OP, x, shift, scale)
    tokens, dim = x.shape
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(dim)
    _rows[(tokens,)](
        x, shift, scale, out, x.stride(0), shift.stride(0), scale.stride(0), dim, tokens // shift.shape[0], dim, eps,
        WIDTH=width, num_warps=warps(width),
    )  # fmt: skip
    return out
