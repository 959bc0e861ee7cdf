"""Attention over pages through torch's own: a gathered copy of the pages, keys turned, one library call.

The library decides what runs (cuDNN, flash or another of its kernels). It serves any number of slots, but reads that
number on the host, so a captured CUDA graph of it holds for that number alone.
"""

from __future__ import annotations

import torch.nn.functional as F

from ..operands import GPU_FLOATS
from ..rope import axis_frequencies, axis_pairs, rotate
from .operands import check_attention
from .reference import shown


def paged_attention(
    q, k_pages, v_pages, page_ids, positions, count, q_positions, *, theta: float = 10000.0, k_scale=None, v_scale=None,
    wide: bool = False,
):  # fmt: skip
    """See `reference.paged_attention`. float32, bfloat16 or float16; e4m3 pages are copied to q's type.

    Positions count from the first query, since only differences enter: angles stay small, and keys stay exact.
    """
    table = (page_ids, positions, count, q_positions)
    check_attention(
        q, k_pages, v_pages, *table, dtypes=GPU_FLOATS, device=q.device.type, k_scale=k_scale, v_scale=v_scale
    )
    tokens, heads, head_dim = q.shape
    frames, valid = q_positions.shape[0], int(count)
    ids, first = page_ids[:valid].long(), q_positions[0].double()
    rate = axis_frequencies(axis_pairs(head_dim)[0], theta).to(q.device)
    query = q.unflatten(0, (frames, tokens // frames))
    query = rotate(query, (q_positions.double() - first)[:, None, None, None] * rate, 0).flatten(0, 1)
    key = shown(k_pages, k_scale, ids, q.dtype)
    key = rotate(key, (positions[:valid].double() - first)[:, None, None, None] * rate, 0).flatten(0, 1)
    value = shown(v_pages, v_scale, ids, q.dtype).flatten(0, 1)
    batch = (part.transpose(0, 1)[None] for part in (query, key, value))
    return F.scaled_dot_product_attention(*batch)[0].transpose(0, 1)
