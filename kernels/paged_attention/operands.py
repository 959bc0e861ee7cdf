"""Check of the operands of paged attention, shared by the compiled kernels."""

from __future__ import annotations

import torch

from ..operands import check_divides, check_size, check_tensor

OP = "paged_attention"


def check_attention(
    q, k_pages, v_pages, page_ids, positions, count, q_positions, *, dtypes, device: str = "cpu"
) -> None:
    """Raise KernelError unless shapes and types are those of `reference.paged_attention`; q's type is in `dtypes`."""
    check_tensor(OP, "q", q, 3, dtypes, device)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_tensor(OP, name, pages, 4, (q.dtype,), device)
    table = {"page_ids": page_ids, "positions": positions, "count": count, "q_positions": q_positions}
    for name, part in table.items():
        check_tensor(OP, name, part, 1, (torch.int32,), device)
    tokens, heads, head_dim = q.shape
    check_size(OP, "heads of k_pages", k_pages.shape[2], heads, "heads of q")
    check_size(OP, "head_dim of k_pages", k_pages.shape[3], head_dim, "head_dim of q")
    for axis, what in enumerate(("pages", "page_tokens", "heads", "head_dim")):
        check_size(OP, f"{what} of v_pages", v_pages.shape[axis], k_pages.shape[axis], f"{what} of k_pages")
    check_size(OP, "length of positions", positions.shape[0], page_ids.shape[0], "length of page_ids")
    check_size(OP, "length of count", count.shape[0], 1, "number of tables")
    check_divides(OP, "tokens of q", tokens, "chunk_frames (length of q_positions)", q_positions.shape[0])
    check_divides(OP, "head_dim", head_dim, "a rotary pair of", 2)
