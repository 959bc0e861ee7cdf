"""Rows of activations in e4m3 on a GPU, in Triton, GELU included; and the rounding that other kernels share.

One program a row: it stays in registers between its largest magnitude and the result, so it is read once and written
once. A row of 8,960 is held as 8,192 and 1,024 values, not as 16,384: GELU's exponentials on lanes beyond the row would
cost more than the memory.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..fp8 import E4M3
from ..operands import GPU_FLOATS, check_tensor
from .reference import Rows

OP = "quantise_rows"


@triton.jit
def e4m3(x, HARDWARE: tl.constexpr):
    """x, of at most 448, rounded to the nearest e4m3 (ties to even), as its bits, uint8.

    HARDWARE: the device converts. Else half a unit of the last place kept is added to the bits of float32, whose
    exponent counts from 120 lower; below 2^-6, where e4m3 has steps of 2^-9, the sum with 2^14 rounds to such steps.
    """
    if HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF
    rounded = tl.where(size < 0.015625, small, tl.minimum(normal, 0x7E))
    return (rounded | tl.where(x < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def factors(largest):
    """448 / largest and largest / 448, each rounded once, as `fp8.quantise` has them."""
    largest = tl.maximum(largest, 1e-12)
    return tl.div_rn(largest * 0.0 + 448.0, largest), tl.div_rn(largest, largest * 0.0 + 448.0)


@triton.jit
def store_row(value, inside, out, channel, scale, HARDWARE: tl.constexpr):
    """Write one row in float32, zero where not `inside`, as e4m3 to `out` and its scale to `scale`."""
    factor, size = factors(tl.max(tl.abs(value), 0))
    tl.store(out + channel, e4m3(value * factor, HARDWARE), mask=inside)
    tl.store(scale, size)


@triton.jit
def _load(row, channel, dim, GELU: tl.constexpr):
    x = tl.load(row + channel, mask=channel < dim, other=0.0).to(tl.float32)
    if GELU:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    return x


@triton.jit
def _rows(
    x, out, scale, x_row, dim, GELU: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HARDWARE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    value = _load(x + row * x_row, channel, dim, GELU)
    largest = tl.max(tl.abs(value), 0)
    if REST:
        beyond = WIDTH + tl.arange(0, REST)
        tail = _load(x + row * x_row, beyond, dim, GELU)
        largest = tl.maximum(largest, tl.max(tl.abs(tail), 0))
    factor, size = factors(largest)
    tl.store(out + row * dim + channel, e4m3(value * factor, HARDWARE), mask=channel < dim)
    if REST:
        tl.store(out + row * dim + beyond, e4m3(tail * factor, HARDWARE), mask=beyond < dim)
    tl.store(scale + row, size)


@cache
def converts(device: torch.device) -> bool:
    """Whether a device rounds to e4m3 by itself (compute capability 8.9 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def empty_rows(tokens: int, dim: int, device: torch.device) -> Rows:
    """Room for `Rows`."""
    values = torch.empty((tokens, dim), dtype=E4M3, device=device)
    return Rows(values, torch.empty(tokens, dtype=torch.float32, device=device))


def parts(dim: int) -> tuple[int, int]:
    """Two powers of two that hold a row with few lanes beyond it; the second may be 0."""
    width = 1 << (dim.bit_length() - 1)
    return width, triton.next_power_of_2(dim - width) if dim > width else 0


def quantise_rows(x, *, gelu: bool = False) -> Rows:
    """See `reference.quantise_rows`. float32, bfloat16 or float16; rows may be strided."""
    check_tensor(OP, "x", x, 2, GPU_FLOATS, x.device.type)
    tokens, dim = x.shape
    out = empty_rows(tokens, dim, x.device)
    width, rest = parts(dim)
    _rows[(tokens,)](
        x, out.values.view(torch.uint8), out.scale, x.stride(0), dim, GELU=gelu, WIDTH=width, REST=rest,
        HARDWARE=converts(x.device), num_warps=max(1, min(8, width // 256)),
    )  # fmt: skip
    return out
