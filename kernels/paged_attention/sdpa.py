"""Attention over pages through torch's own: a gathered copy of the pages, keys turned, one library call.

The library decides what runs (cuDNN or another of its kernels that takes a mask). The number of slots in use is read on
the device, so that one captured CUDA graph serves every state of a memory: all slots are gathered, those beyond the
number repeat the first page, and a mask hides their keys. What that costs: a memory that has not filled is computed as
a full one, and torch's flash kernel, which takes no mask, is out of the choice. The benches' library baseline is that
call without a mask, on keys gathered before the clock runs.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from ..operands import GPU_FLOATS
from ..rope import axis_frequencies, axis_pairs, rotate
from .operands import check_attention
from .reference import shown


@cache  # kept: a captured graph holds the address
def _rates(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """(temporal pairs,) float64 turning rates."""
    return axis_frequencies(axis_pairs(head_dim)[0], theta).to(device)


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
    frames, page_tokens = q_positions.shape[0], k_pages.shape[1]
    in_use = torch.arange(page_ids.shape[0], device=q.device) < count
    ids = torch.where(in_use, page_ids, page_ids[:1]).long()
    times = torch.where(in_use, positions, positions[:1]).double()
    rate, first = _rates(head_dim, theta, q.device), q_positions[0].double()
    query = q.unflatten(0, (frames, tokens // frames))
    query = rotate(query, (q_positions.double() - first)[:, None, None, None] * rate, 0).flatten(0, 1)
    key = rotate(shown(k_pages, k_scale, ids, q.dtype), (times - first)[:, None, None, None] * rate, 0).flatten(0, 1)
    value = shown(v_pages, v_scale, ids, q.dtype).flatten(0, 1)
    mask = in_use[:, None].expand(-1, page_tokens).reshape(1, 1, 1, -1)
    batch = (part.transpose(0, 1)[None] for part in (query, key, value))
    return F.scaled_dot_product_attention(*batch, attn_mask=mask)[0].transpose(0, 1)
