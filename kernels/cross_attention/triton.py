"""Attention to the keys of a prompt on a GPU, in Triton.

One program holds a tile of queries of one head. Keys behind the last finite bias, a prompt's padding to a fixed
length, are neither read nor multiplied: their number is found on the device, so one captured launch serves every
prompt. Softmax is online, in base 2, sums in float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..operands import GPU_FLOATS, check_size, check_tensor

OP = "cross_attention"
LEAST = 16  # smallest side of a product on the tensor cores
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _attend(
    q, k, v, bias, out, tokens, keys, scale, q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(q . k / sqrt(HEAD) + bias) v of a tile of M queries and one head; scale carries log2(e) too."""
    head = tl.program_id(1)
    row, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    mask = (row < tokens)[:, None] & (channel < HEAD)[None, :]
    query = tl.load(q + row[:, None] * q_token + head * q_head + channel[None, :], mask=mask, other=0.0)
    every = tl.arange(0, KEYS)
    shown = tl.load(bias + every, mask=every < keys, other=float("-inf")) > float("-inf")
    used = tl.max(tl.where(shown, every + 1, 0), 0)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, WIDTH), tl.float32)
    for start in range(0, used, N):
        key = start + tl.arange(0, N)
        exists, inside = key < used, channel < HEAD
        place = k + key[None, :] * k_token + head * k_head + channel[:, None]
        score = tl.dot(
            query, tl.load(place, mask=inside[:, None] & exists[None, :], other=0.0), input_precision=PRECISION
        )
        add = tl.load(bias + key, mask=exists, other=float("-inf")) * LOG2_E
        score = score * scale + add[None, :]
        # a tile may hold masked keys alone; -inf - -inf is no number
        peak = tl.maximum(tl.maximum(top, tl.max(score, 1)), -1e30)
        weight = tl.exp2(score - peak[:, None])
        fade = tl.exp2(top - peak)
        place = v + key[:, None] * v_token + head * v_head + channel[None, :]
        values = tl.load(place, mask=exists[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(weight.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)
        total = total * fade + tl.sum(weight, 1)
        top = peak
    result = (sums / total[:, None]).to(query.dtype)
    tl.store(out + row[:, None] * out_token + head * out_head + channel[None, :], result, mask=mask)


def cross_attention(q, k, v, bias):
    """See `reference.cross_attention`. float32, bfloat16 or float16; at least one bias is finite."""
    device = q.device.type
    check_tensor(OP, "q", q, 3, GPU_FLOATS, device)
    for name, part in (("k", k), ("v", v)):
        check_tensor(OP, name, part, 3, (q.dtype,), device)
        check_size(OP, f"keys of {name}", part.shape[0], bias.shape[0], "length of bias")
        check_size(OP, f"heads of {name}", part.shape[1], q.shape[1], "heads of q")
        check_size(OP, f"head_dim of {name}", part.shape[2], q.shape[2], "head_dim of q")
    check_tensor(OP, "bias", bias, 1, (torch.float32,), device)
    tokens, heads, head_dim = q.shape
    width, keys = max(LEAST, triton.next_power_of_2(head_dim)), bias.shape[0]
    wide = q.dtype == torch.float32
    m, n, stages = (64, 32, 1) if wide else (128, 64, 2)  # what 99 KiB of shared memory hold
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    _attend[triton.cdiv(tokens, m), heads](
        q, k, v, bias, out, tokens, keys, math.log2(math.e) / math.sqrt(head_dim), *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], *out.stride()[:2], HEAD=head_dim, WIDTH=width, M=m, N=n,
        KEYS=triton.next_power_of_2(keys), PRECISION="ieee" if wide else "tf32", num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out
