"""Clean latents brought back to a noise level on a GPU, in Triton: each operand is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..operands import GPU_FLOATS, check_latents

OP = "renoise"
BLOCK = 1024


@triton.jit
def _elements(x0, noise, out, count, keep, sigma, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    clean = tl.load(x0 + place, mask=inside, other=0.0)
    random = tl.load(noise + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (keep * clean.to(tl.float32) + sigma * random).to(clean.dtype), mask=inside)


def renoise(x0, noise, sigma: float):
    """See `reference.renoise`. float32, bfloat16 or float16; sigma is rounded to float32."""
    x0, noise = check_latents(OP, {"x0": x0, "noise": noise}, GPU_FLOATS)
    out = torch.empty_like(x0)
    _elements[(triton.cdiv(x0.numel(), BLOCK),)](x0, noise, out, x0.numel(), 1 - sigma, sigma, BLOCK=BLOCK, num_warps=4)
    return out
