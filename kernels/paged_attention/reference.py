"""Attention of a chunk over the pages of a table, temporal rotation on the query side."""

from __future__ import annotations

import torch

from ..rope import axis_frequencies, axis_pairs, rotate


def shown(pages, scale, ids, dtype):
    """Pages `ids` of a pool as (slots, page_tokens, heads, head_dim) in `dtype`, times their scales if any."""
    if scale is None:
        return pages[ids].to(dtype)
    bits = pages if pages.element_size() > 1 else pages.view(torch.uint8)  # an 8-bit float is indexed as bytes
    return bits[ids].view(pages.dtype).to(dtype) * scale[ids].to(dtype)[:, None, :, None]


def paged_attention(
    q, k_pages, v_pages, page_ids, positions, count, q_positions, *, theta: float = 10000.0, k_scale=None, v_scale=None,
    wide: bool = False,
):  # fmt: skip
    """softmax(R_{t_q - t_k} q . k / sqrt(head_dim)) v, over the first `count` slots of a table.

    Pages hold keys rotated by row and column only. Rotations of time, rows and columns act on disjoint channels and
    commute, and a score sees only the difference of temporal positions, so turning the query by t_q - t_k equals
    rotary positions on both sides (RoFormer, arXiv 2104.09864), and a page never changes when its position does.

    q: (tokens, heads, head_dim), normed, rotated by row and column; frame-major, tokens = chunk_frames * page_tokens
    k_pages, v_pages: (pages, page_tokens, heads, head_dim), any strides with a unit last one
    page_ids, positions: (slots,) int32      count: (1,) int32, slots attended, at least 1
    q_positions: (chunk_frames,) int32
    k_scale, v_scale: (pages, heads) float32 where pages are e4m3: a key is k_pages * k_scale of its page and head;
    v_pages then have any strides      wide: for kernels, which with e4m3 pages may round the turned query (one scale a
    row) and the weights to e4m3 too (`rounding.py`); True keeps 16 bits or more, as this reference does
    -> (tokens, heads, head_dim) in q's type; sums in float32 (float64 for float64 input)
    """
    tokens, heads, head_dim = q.shape
    frames = q_positions.shape[0]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    valid = int(count)
    ids = page_ids[:valid].long()
    time_pairs = axis_pairs(head_dim)[0]
    rate = axis_frequencies(time_pairs, theta).to(q.device)
    query = q.view(frames, tokens // frames, heads, head_dim)
    delta = q_positions[None].to(torch.float64) - positions[:valid, None].to(torch.float64)  # (slots, frames)
    turned = rotate(query[None], delta[:, :, None, None, None] * rate, 0).flatten(1, 2).to(dtype)
    keys, values = shown(k_pages, k_scale, ids, dtype), shown(v_pages, v_scale, ids, dtype).flatten(0, 1)
    scores = torch.einsum("sqhd,skhd->hqsk", turned, keys).flatten(2)
    weight = torch.softmax(scores * head_dim**-0.5, dim=-1)
    return torch.einsum("hqk,khd->qhd", weight, values).to(q.dtype)
