"""Attention over pages on the CPU, compiled."""

from __future__ import annotations

import torch

from cfengine import _C

from ..operands import FLOATS, refuse_fp8
from .operands import check_attention


def paged_attention(
    q, k_pages, v_pages, page_ids, positions, count, q_positions, *, theta: float = 10000.0, k_scale=None, v_scale=None,
    wide: bool = False,
):  # fmt: skip
    """See `reference.paged_attention`. float32 or bfloat16; in bfloat16 the softmax weights are rounded too."""
    refuse_fp8("paged_attention", k_scale is not None or v_scale is not None)
    table = (page_ids, positions, count, q_positions)
    check_attention(q, k_pages, v_pages, *table, dtypes=FLOATS)
    tokens, heads, head_dim = q.shape
    pages, page_tokens = k_pages.shape[:2]
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype)
    _C.paged_attention(
        q.data_ptr(), q.stride()[:2], k_pages.data_ptr(), k_pages.stride()[:3],
        v_pages.data_ptr(), v_pages.stride()[:3], *(part.data_ptr() for part in table),
        out.data_ptr(), out.stride()[:2], tokens, q_positions.shape[0], heads, head_dim,
        pages, page_tokens, page_ids.shape[0], theta, q.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out
