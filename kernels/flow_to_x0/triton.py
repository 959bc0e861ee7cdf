"""The clean latents of a flow prediction on a GPU, in Triton: each operand is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..operands import GPU_FLOATS, check_latents

OP = "flow_to_x0"
BLOCK = 1024


@triton.jit
def _elements(x, flow, out, count, sigma, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    old = tl.load(x + place, mask=inside, other=0.0)
    step = tl.load(flow + place, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + place, (old.to(tl.float64) - sigma * step).to(old.dtype), mask=inside)


def flow_to_x0(x, flow, sigma: float):
    """See `reference.flow_to_x0`. float32, bfloat16 or float16, in any dense layout; sigma is rounded to float32."""
    x, flow = check_latents(OP, {"x": x, "flow": flow}, GPU_FLOATS)
    out = torch.empty_like(x)
    _elements[(triton.cdiv(x.numel(), BLOCK),)](x, flow, out, x.numel(), sigma, BLOCK=BLOCK, num_warps=4)
    return out
