"""RMS norms, spatial rotation and the page write of a chunk on a GPU, in Triton.

One program a block of tokens, one token at a time: its row stays in registers from the sum of squares to the page, so
q, k and v are read once and written once. Normed, unrotated keys are summed block by block in float32; a second kernel
adds the blocks in float64, in a fixed order, so equal inputs give an equal mean and an equal memory decision.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..modulated_norm.triton import warps
from ..operands import GPU_FLOATS, check_size, check_tensor
from ..rope import axis_pairs, spatial_table

OP = "qk_norm_rope_store"
BLOCK = 8  # tokens of a program


@triton.jit
def _norm(row, weight, channel, dim, eps):
    """rms norm of one row, rounded to the type of the row as the reference rounds it."""
    x = tl.load(row + channel, mask=channel < dim, other=0.0)
    wide = x.to(tl.float32)
    factor = tl.load(weight + channel, mask=channel < dim, other=0.0).to(tl.float32)
    return (wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / dim + eps)) * factor).to(x.dtype)


@triton.jit
def _rotated(x, table, token, channel, dim, HALF: tl.constexpr, FIRST: tl.constexpr, SPATIAL: tl.constexpr,
             WIDTH: tl.constexpr):  # fmt: skip
    """Turn the pairs FIRST .. FIRST + SPATIAL of every head (HALF pairs) of a row by the angles of its token."""
    pair = tl.arange(0, WIDTH // 2)
    own = pair % HALF - FIRST
    turns = (own >= 0) & (own < SPATIAL) & (2 * pair < dim)
    place = table + (token * SPATIAL + own) * 2
    cosine = tl.load(place, mask=turns, other=1.0)
    sine = tl.load(place + 1, mask=turns, other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (WIDTH // 2, 2)))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(turned, (WIDTH,)).to(x.dtype)


@triton.jit
def _store(
    q, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, table, out, sums, q_row, k_row, v_row,
    k_page, k_token, k_head, v_page, v_token, v_head, tokens, page_tokens, dim, eps,
    HEAD: tl.constexpr, FIRST: tl.constexpr, SPATIAL: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    channel = tl.arange(0, WIDTH)
    inside = channel < dim
    head, within = channel // HEAD, channel % HEAD
    total = tl.zeros((WIDTH,), tl.float32)
    for row in range(first, tl.minimum(first + BLOCK, tokens)):
        far, token = tl.cast(row, tl.int64), row % page_tokens
        page = tl.load(page_ids + row // page_tokens).to(tl.int64)
        key = _norm(k + far * k_row, norm_k, channel, dim, eps)
        total += key.to(tl.float32)
        key = _rotated(key, table, token, channel, dim, HEAD // 2, FIRST, SPATIAL, WIDTH)
        tl.store(k_pages + page * k_page + token * k_token + head * k_head + within, key, mask=inside)
        value = tl.load(v + far * v_row + channel, mask=inside, other=0.0)
        tl.store(v_pages + page * v_page + token * v_token + head * v_head + within, value, mask=inside)
        if QUERIES:
            query = _norm(q + far * q_row, norm_q, channel, dim, eps)
            query = _rotated(query, table, token, channel, dim, HEAD // 2, FIRST, SPATIAL, WIDTH)
            tl.store(out + far * dim + channel, query, mask=inside)
    tl.store(sums + tl.program_id(0) * dim + channel, total, mask=inside)


@triton.jit
def _mean(sums, mean, blocks, tokens, dim, WIDTH: tl.constexpr):
    """mean = sum of the blocks / tokens, in float64 and in order."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for block in range(0, blocks):
        total += tl.load(sums + block * dim + channel, mask=channel < dim, other=0.0).to(tl.float64)
    tl.store(mean + channel, (total / tokens).to(tl.float32), mask=channel < dim)


@cache  # kept: a captured graph holds the address
def _table(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """`spatial_table` on a device."""
    return spatial_table(rows, columns, head_dim, theta).to(device)


def qk_norm_rope_store(
    q, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, grid, *, eps: float = 1e-6, theta: float = 10000.0
):
    """See `reference.qk_norm_rope_store`. float32, bfloat16 or float16; pages have the type of k."""
    device = k.device.type
    check_tensor(OP, "k", k, 2, GPU_FLOATS, device)
    for name, part in (("v", v), *([] if q is None else [("q", q)])):
        check_tensor(OP, name, part, 2, (k.dtype,), device)
        check_size(OP, f"tokens of {name}", part.shape[0], k.shape[0], "tokens of k")
        check_size(OP, f"width of {name}", part.shape[1], k.shape[1], "width of k")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_tensor(OP, name, pages, 4, (k.dtype,), device)
    check_tensor(OP, "page_ids", page_ids, 1, (torch.int32,), device)
    for name, weight in (("norm_q", norm_q), ("norm_k", norm_k)):
        check_tensor(OP, name, weight, 1, GPU_FLOATS, device)
        check_size(OP, f"length of {name}", weight.shape[0], k.shape[1], "width of k")
    tokens, dim = k.shape
    _, page_tokens, heads, head_dim = k_pages.shape
    check_size(OP, "heads * head_dim of k_pages", heads * head_dim, dim, "width of k")
    check_size(OP, "rows * columns of grid", grid[0] * grid[1], page_tokens, "page_tokens of k_pages")
    check_size(OP, "tokens of k", tokens, page_tokens * page_ids.shape[0], "page_tokens * length of page_ids")
    table = _table(*grid, head_dim, theta, k.device)
    blocks, width = triton.cdiv(tokens, BLOCK), triton.next_power_of_2(dim)
    out = None if q is None else torch.empty((tokens, heads, head_dim), dtype=k.dtype, device=k.device)
    sums = torch.empty((blocks, dim), dtype=torch.float32, device=k.device)
    mean = torch.empty(dim, dtype=torch.float32, device=k.device)
    time_pairs, row_pairs, column_pairs = axis_pairs(head_dim)
    queries = k if q is None else q  # an unread pointer where only pages are wanted
    _store[(blocks,)](
        queries, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, table, sums if out is None else out, sums,
        queries.stride(0), k.stride(0), v.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3],
        tokens, page_tokens, dim, eps, HEAD=head_dim, FIRST=time_pairs, SPATIAL=row_pairs + column_pairs,
        QUERIES=q is not None, WIDTH=width, BLOCK=BLOCK, num_warps=warps(width),
    )  # fmt: skip
    _mean[(triton.cdiv(dim, 128),)](sums, mean, blocks, tokens, dim, WIDTH=128, num_warps=4)
    return out, mean
