"""Attention over pages on an NVIDIA GPU, compiled: wgmma on Hopper (sm90*.cu), mma on others from 8.0 on (sm80.cu)."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from cfengine import _C

from ..rope import axis_frequencies, axis_pairs
from .operands import check_attention

if not _C.cuda_architectures():
    raise ImportError("cfengine._C was built without CUDA; put nvcc 12.4 or later on PATH")

HALVES = (torch.float16, torch.bfloat16)
HEADS = (64, 128)  # head sizes that are built


class Device(NamedTuple):
    """What a launch needs to know of a GPU."""

    kernel: int  # 90: for Hopper alone, 80: for all from compute capability 8.0 on, 0: none
    multiprocessors: int
    e4m3: bool  # whether its tensor cores multiply e4m3


@cache
def _device(index: int) -> Device:
    gpu = torch.cuda.get_device_properties(index)
    capability = (gpu.major, gpu.minor)
    hopper = gpu.major == 9 and "90a" in _C.cuda_architectures()
    kernel = 90 if hopper else 80 if capability >= (8, 0) else 0
    return Device(kernel, gpu.multi_processor_count, capability >= (8, 9))


def _stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


@cache  # kept: a captured graph holds the address
def _phases(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """(pairs,) int64 turns per position in units of 2^-64; pairs is the next multiple of 8."""
    pairs = axis_pairs(head_dim)[0]
    turns = [round(rate / (2 * math.pi) * 2**64) for rate in axis_frequencies(pairs, theta).tolist()]
    return torch.tensor(turns + [0] * (-pairs % 8), dtype=torch.int64, device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _takes(device: Device, q, e4m3: bool, wide: bool) -> bool:
    fits = device.kernel and q.dtype in HALVES and q.dim() == 3 and q.shape[2] in HEADS
    return bool(fits) and (not e4m3 or device.e4m3 and not wide)


def paged_attention(
    q, k_pages, v_pages, page_ids, positions, count, q_positions, *, theta: float = 10000.0, k_scale=None, v_scale=None,
    wide: bool = False,
):  # fmt: skip
    """See `reference.paged_attention`. float16 or bfloat16, head_dim 64 or 128; e4m3 pages from capability 8.9 on.

    What has no CUDA kernel goes to Triton's: other head sizes, float32, e4m3 pages with `wide` or on an older GPU.
    Pages of e4m3 whose tokens are no multiple of 4 go to sm80.cu on Hopper too. e4m3 values have their tokens adjacent
    (v_pages.stride(1) == 1) and channels a multiple of 16 apart.
    """
    table = (page_ids, positions, count, q_positions)
    device, e4m3 = _device(q.device.index), k_scale is not None or v_scale is not None
    if not _takes(device, q, e4m3, wide):
        from .triton import paged_attention as general

        return general(q, k_pages, v_pages, *table, theta=theta, k_scale=k_scale, v_scale=v_scale, wide=wide)
    check_attention(q, k_pages, v_pages, *table, dtypes=HALVES, device=q.device.type, k_scale=k_scale, v_scale=v_scale)
    kernel = 80 if e4m3 and k_pages.shape[1] % 4 else device.kernel
    tokens, heads, head_dim = q.shape
    frames, slots = q_positions.shape[0], page_ids.shape[0]
    types = _name(q.dtype), _name(k_pages.dtype)
    phases = _phases(head_dim, theta, q.device)
    with torch.cuda.device_of(q):  # the launch goes to the current GPU
        wanted = _C.paged_attention_cuda_scratch(kernel, *types, tokens, heads, head_dim, device.multiprocessors)
        # allocated anew for every call: the allocator knows streams, and inside a capture it keeps them for the graph
        scratch = torch.empty(wanted, dtype=torch.float32, device=q.device)
        turns = torch.empty((slots, frames, phases.shape[0], 2), dtype=torch.float32, device=q.device)
        out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
        scales = (0 if scale is None else scale.data_ptr() for scale in (k_scale, v_scale))
        _C.paged_attention_cuda(
            kernel, *types, q.data_ptr(), q.stride()[:2], k_pages.data_ptr(), k_pages.stride(),
            v_pages.data_ptr(), v_pages.stride(), *scales, *(part.data_ptr() for part in table),
            phases.data_ptr(), turns.data_ptr(), scratch.data_ptr(), wanted, out.data_ptr(), out.stride()[:2],
            tokens, frames, heads, head_dim, k_pages.shape[1], slots, phases.shape[0], head_dim**-0.5,
            device.multiprocessors, _stream(q.device.index),
        )  # fmt: skip
    return out
