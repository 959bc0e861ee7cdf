"""RMS norms, spatial rotation and the page write of a chunk on a GPU, in Triton.

One program a block of tokens of one page, one token at a time: its row stays in registers from the sum of squares to
the page, so q, k and v are read once and written once. Normed, unrotated keys are summed block by block in float32; a
second kernel adds the blocks in float64, in a fixed order, so equal inputs give an equal mean and an equal decision.

Pages in e4m3 need the largest magnitude of a page and head first: the first kernel then writes its keys to a scratch
page, which stays in the L2 cache, and collects the magnitudes of keys and values; another rounds both into the pages,
values with their tokens side by side.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..fp8 import E4M3
from ..modulated_norm.triton import warps
from ..operands import GPU_FLOATS, check_size, check_tensor
from ..quantise_rows.triton import converts, e4m3, factors
from ..rope import axis_pairs, spatial_table

OP = "qk_norm_rope_store"
BLOCK = 8  # tokens of a program
TILE = 64  # tokens of a program that rounds one head


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
def _extend(largest, row, channel, dim, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Raise largest[head] to the largest number of every head of a row of magnitudes; any order gives the same."""
    if WIDTH % HEAD == 0:
        head = tl.arange(0, WIDTH // HEAD)
        tl.atomic_max(largest + head, tl.max(tl.reshape(row, (WIDTH // HEAD, HEAD)), 1), mask=head * HEAD < dim)
    else:
        tl.atomic_max(largest + channel // HEAD, row, mask=channel < dim)


@triton.jit
def _store(
    q, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, table, out, sums, largest, q_row, k_row, v_row,
    k_page, k_token, k_head, v_page, v_token, v_head, page_tokens, heads, dim, eps,
    HEAD: tl.constexpr, FIRST: tl.constexpr, SPATIAL: tl.constexpr, QUERIES: tl.constexpr, FP8: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frame, first = tl.program_id(1), tl.program_id(0) * BLOCK
    channel = tl.arange(0, WIDTH)
    inside = channel < dim
    head, within = channel // HEAD, channel % HEAD
    page = tl.load(page_ids + frame).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    top_key, top_value = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for token in range(first, tl.minimum(first + BLOCK, page_tokens)):
        far = (frame * page_tokens + token).to(tl.int64)
        key = _norm(k + far * k_row, norm_k, channel, dim, eps)
        total += key.to(tl.float32)
        key = _rotated(key, table, token, channel, dim, HEAD // 2, FIRST, SPATIAL, WIDTH)
        tl.store(k_pages + page * k_page + token * k_token + head * k_head + within, key, mask=inside)
        value = tl.load(v + far * v_row + channel, mask=inside, other=0.0)
        if FP8:
            top_key = tl.maximum(top_key, tl.abs(key.to(tl.float32)))
            top_value = tl.maximum(top_value, tl.abs(value.to(tl.float32)))
        else:
            tl.store(v_pages + page * v_page + token * v_token + head * v_head + within, value, mask=inside)
        if QUERIES:
            query = _norm(q + far * q_row, norm_q, channel, dim, eps)
            query = _rotated(query, table, token, channel, dim, HEAD // 2, FIRST, SPATIAL, WIDTH)
            tl.store(out + far * dim + channel, query, mask=inside)
    tl.store(sums + (frame * tl.num_programs(0) + tl.program_id(0)) * dim + channel, total, mask=inside)
    if FP8:
        _extend(largest + frame * heads, top_key, channel, dim, HEAD, WIDTH)
        _extend(largest + (tl.num_programs(1) + frame) * heads, top_value, channel, dim, HEAD, WIDTH)


@triton.jit
def _round(
    keys, v, k_pages, v_pages, k_scale, v_scale, page_ids, largest, v_row,
    k_page, k_token, k_head, v_page, v_token, v_head, v_channel, page_tokens, heads, dim,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Tokens of one frame and head to e4m3: keys (tokens, dim) to k_pages, v to v_pages, and the two scales."""
    frame, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    page = tl.load(page_ids + frame).to(tl.int64)
    token, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    mask = (token < page_tokens)[:, None] & (channel < HEAD)[None, :]
    row = (frame * page_tokens + token).to(tl.int64)[:, None]
    own = head * HEAD + channel[None, :]
    by_key, key_size = factors(tl.load(largest + frame * heads + head))
    by_value, value_size = factors(tl.load(largest + (tl.num_programs(1) // heads + frame) * heads + head))
    key = tl.load(keys + row * dim + own, mask=mask, other=0.0).to(tl.float32)
    place = k_pages + page * k_page + token[:, None] * k_token + head * k_head + channel[None, :]
    tl.store(place, e4m3(key * by_key, HARDWARE), mask=mask)
    value = tl.load(v + row * v_row + own, mask=mask, other=0.0).to(tl.float32)
    place = v_pages + page * v_page + token[:, None] * v_token + head * v_head + channel[None, :] * v_channel
    tl.store(place, e4m3(value * by_value, HARDWARE), mask=mask)
    if tl.program_id(0) == 0:
        tl.store(k_scale + page * heads + head, key_size)
        tl.store(v_scale + page * heads + head, value_size)


@triton.jit
def _mean(sums, mean, blocks, tokens, dim, WIDTH: tl.constexpr):
    """mean = sum of the blocks / tokens, in float64 and in order."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for block in range(0, blocks):
        total += tl.load(sums + block * dim + channel, mask=channel < dim, other=0.0).to(tl.float64)
    tl.store(mean + channel, (total / tokens).to(tl.float32), mask=channel < dim)


@cache  # kept: a captured graph holds the address
def _frames(frames: int, device: torch.device) -> torch.Tensor:
    """Pages 0, 1, ... of a scratch pool."""
    return torch.arange(frames, dtype=torch.int32, device=device)


@cache  # kept: a captured graph holds the address
def _table(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """`spatial_table` on a device."""
    return spatial_table(rows, columns, head_dim, theta).to(device)


def _check(q, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, grid, k_scale, v_scale) -> None:
    """Raise KernelError unless shapes and types are those of `reference.qk_norm_rope_store`."""
    device = k.device.type
    check_tensor(OP, "k", k, 2, GPU_FLOATS, device)
    for name, part in (("v", v), *([] if q is None else [("q", q)])):
        check_tensor(OP, name, part, 2, (k.dtype,), device)
        check_size(OP, f"tokens of {name}", part.shape[0], k.shape[0], "tokens of k")
        check_size(OP, f"width of {name}", part.shape[1], k.shape[1], "width of k")
    narrow = k_scale is not None or v_scale is not None
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages.transpose(1, 3) if narrow else v_pages)):
        check_tensor(OP, name, pages, 4, (E4M3,) if narrow else (k.dtype,), device)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)) if narrow else ():
        check_tensor(OP, name, scale, 2, (torch.float32,), device)
        check_size(OP, f"pages of {name}", scale.shape[0], k_pages.shape[0], "pages of k_pages")
        check_size(OP, f"stride of pages in {name}", scale.stride(0), k_pages.shape[2], "heads of k_pages")
    check_tensor(OP, "page_ids", page_ids, 1, (torch.int32,), device)
    for name, weight in (("norm_q", norm_q), ("norm_k", norm_k)):
        check_tensor(OP, name, weight, 1, GPU_FLOATS, device)
        check_size(OP, f"length of {name}", weight.shape[0], k.shape[1], "width of k")
    _, page_tokens, heads, head_dim = k_pages.shape
    check_size(OP, "heads * head_dim of k_pages", heads * head_dim, k.shape[1], "width of k")
    check_size(OP, "rows * columns of grid", grid[0] * grid[1], page_tokens, "page_tokens of k_pages")
    check_size(OP, "tokens of k", k.shape[0], page_tokens * page_ids.shape[0], "page_tokens * length of page_ids")


def qk_norm_rope_store(
    q, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, grid, *, eps: float = 1e-6, theta: float = 10000.0,
    k_scale=None, v_scale=None,
):  # fmt: skip
    """See `reference.qk_norm_rope_store`. float32, bfloat16 or float16; pages have the type of k, or are e4m3."""
    _check(q, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, grid, k_scale, v_scale)
    narrow, device = k_scale is not None, k.device
    (tokens, dim), frames = k.shape, page_ids.shape[0]
    _, page_tokens, heads, head_dim = k_pages.shape
    table = _table(*grid, head_dim, theta, device)
    blocks, width = triton.cdiv(page_tokens, BLOCK), triton.next_power_of_2(dim)
    out = None if q is None else torch.empty((tokens, heads, head_dim), dtype=k.dtype, device=device)
    sums = torch.empty((frames * blocks, dim), dtype=torch.float32, device=device)
    mean = torch.empty(dim, dtype=torch.float32, device=device)
    keys, ids, largest = k_pages, page_ids, sums  # largest: an unread pointer
    if narrow:
        keys = torch.empty((frames, page_tokens, heads, head_dim), dtype=k.dtype, device=device)
        ids, largest = _frames(frames, device), torch.zeros((2, frames, heads), device=device)
    time_pairs, row_pairs, column_pairs = axis_pairs(head_dim)
    queries = k if q is None else q  # an unread pointer where only pages are wanted
    _store[blocks, frames](
        queries, k, v, norm_q, norm_k, keys, v_pages, ids, table, sums if out is None else out, sums, largest,
        queries.stride(0), k.stride(0), v.stride(0), *keys.stride()[:3], *v_pages.stride()[:3],
        page_tokens, heads, dim, eps, HEAD=head_dim, FIRST=time_pairs, SPATIAL=row_pairs + column_pairs,
        QUERIES=q is not None, FP8=narrow, WIDTH=width, BLOCK=BLOCK, num_warps=warps(width),
    )  # fmt: skip
    if narrow:
        _round[triton.cdiv(page_tokens, TILE), frames * heads](
            keys, v, k_pages.view(torch.uint8), v_pages.view(torch.uint8), k_scale, v_scale, page_ids, largest,
            v.stride(0), *k_pages.stride()[:3], *v_pages.stride(), page_tokens, heads, dim, HEAD=head_dim,
            WIDTH=triton.next_power_of_2(head_dim), BLOCK=TILE, HARDWARE=converts(device), num_warps=4,
        )  # fmt: skip
    _mean[(triton.cdiv(dim, 128),)](sums, mean, frames * blocks, tokens, dim, WIDTH=128, num_warps=4)
    return out, mean
