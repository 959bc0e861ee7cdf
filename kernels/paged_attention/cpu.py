"""Attention over pages on the CPU, compiled."""

from __future__ import annotations

import torch

from cfengine import _C

from ..operands import FLOATS, check_divides, check_size, check_tensor

OP = "paged_attention"


def paged_attention(q, k_pages, v_pages, page_ids, positions, count, q_positions, *, theta: float = 10000.0):
    """See `reference.paged_attention`. float32 or bfloat16; in bfloat16 the softmax weights are rounded too."""
    check_tensor(OP, "q", q, 3, FLOATS)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_tensor(OP, name, pages, 4, (q.dtype,))
    table = {"page_ids": page_ids, "positions": positions, "count": count, "q_positions": q_positions}
    for name, part in table.items():
        check_tensor(OP, name, part, 1, (torch.int32,))
    tokens, heads, head_dim = q.shape
    pages, page_tokens = k_pages.shape[:2]
    check_size(OP, "heads of k_pages", k_pages.shape[2], heads, "heads of q")
    check_size(OP, "head_dim of k_pages", k_pages.shape[3], head_dim, "head_dim of q")
    for axis, what in enumerate(("pages", "page_tokens", "heads", "head_dim")):
        check_size(OP, f"{what} of v_pages", v_pages.shape[axis], k_pages.shape[axis], f"{what} of k_pages")
    check_size(OP, "length of positions", positions.shape[0], page_ids.shape[0], "length of page_ids")
    check_size(OP, "length of count", count.shape[0], 1, "number of tables")
    check_divides(OP, "tokens of q", tokens, "chunk_frames (length of q_positions)", q_positions.shape[0])
    check_divides(OP, "head_dim", head_dim, "a rotary pair of", 2)
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype)
    _C.paged_attention(
        q.data_ptr(), q.stride()[:2], k_pages.data_ptr(), k_pages.stride()[:3],
        v_pages.data_ptr(), v_pages.stride()[:3], *(part.data_ptr() for part in table.values()),
        out.data_ptr(), out.stride()[:2], tokens, q_positions.shape[0], heads, head_dim,
        pages, page_tokens, page_ids.shape[0], theta, q.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out
