"""Layer norm with scale and shift per latent frame on a GPU, in Triton.

One program a row: the row stays in registers between its two sums and the result, so it is read once and written once,
in e4m3 where the product that follows takes it so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..operands import GPU_FLOATS, check_divides, check_size, check_tensor
from ..quantise_rows.triton import converts, empty_rows, store_row

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
    x, shift, scale, out, sizes, x_row, shift_row, scale_row, frame_tokens, dim, eps, FP8: tl.constexpr,
    HARDWARE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    far = row.to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < dim
    frame = row // frame_tokens
    value = tl.load(x + far * x_row + channel, mask=inside, other=0.0)
    add = tl.load(shift + frame * shift_row + channel, mask=inside, other=0.0).to(tl.float32)
    times = tl.load(scale + frame * scale_row + channel, mask=inside, other=0.0).to(tl.float32)
    result = normed(value.to(tl.float32), add, times, inside, dim, eps)
    if FP8:
        store_row(result, inside, out + far * dim, channel, sizes + row, HARDWARE)
    else:
        tl.store(out + far * dim + channel, result.to(value.dtype), mask=inside)


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


def empty_normed(x, fp8: bool):
    """Room for the norm of x (tokens, dim): a tensor of its type, or e4m3 `Rows`."""
    return empty_rows(*x.shape, x.device) if fp8 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def norm_pointers(out, fp8: bool):
    """What a kernel writes: values (e4m3 as bytes) and their scales, an unread pointer where there are none."""
    return (out.values.view(torch.uint8), out.scale) if fp8 else (out, out)


def modulated_norm(x, shift, scale, *, eps: float = 1e-6, fp8: bool = False):
    """See `reference.modulated_norm`. float32, bfloat16 or float16, rows of x may be strided."""
    check_tensor(OP, "x", x, 2, GPU_FLOATS, x.device.type)
    check_rows(OP, x, shift, scale)
    tokens, dim = x.shape
    out = empty_normed(x, fp8)
    rows, sizes = norm_pointers(out, fp8)
    width = triton.next_power_of_2(dim)
    _rows[(tokens,)](
        x, shift, scale, rows, sizes, x.stride(0), shift.stride(0), scale.stride(0), tokens // shift.shape[0], dim,
        eps, FP8=fp8, HARDWARE=converts(x.device), WIDTH=width, num_warps=warps(width),
    )  # fmt: skip
    return out
