"""Check of the operands of paged attention, shared by the compiled kernels."""

from __future__ import annotations

import torch

from cfengine.errors import KernelError

from ..fp8 import E4M3
from ..operands import check_divides, check_size, check_tensor

OP = "paged_attention"


def check_attention(
    q, k_pages, v_pages, page_ids, positions, count, q_positions, *, dtypes, device: str = "cpu", k_scale=None,
    v_scale=None,
) -> None:  # fmt: skip
    """Raise KernelError unless shapes and types are those of `reference.paged_attention`; q's type is in `dtypes`.

    With k_scale and v_scale, (pages, heads) float32, pages are e4m3 and tokens of v_pages are adjacent, not channels.
    """
    check_tensor(OP, "q", q, 3, dtypes, device)
    narrow = k_scale is not None
    if narrow != (v_scale is not None):
        raise KernelError(f"{OP}: only one of k_scale and v_scale is given; pass both for pages of e4m3")
    page_types = (E4M3,) if narrow else (q.dtype,)
    check_tensor(OP, "k_pages", k_pages, 4, page_types, device)
    if narrow:
        check_tensor(OP, "v_pages", v_pages.transpose(1, 3), 4, page_types, device)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            check_tensor(OP, name, scale, 2, (torch.float32,), device)
            check_size(OP, f"pages of {name}", scale.shape[0], k_pages.shape[0], "pages of k_pages")
            check_size(OP, f"heads of {name}", scale.shape[1], q.shape[1], "heads of q")
            check_size(OP, f"stride of pages in {name}", scale.stride(0), scale.shape[1], "its number of heads")
    else:
        check_tensor(OP, "v_pages", v_pages, 4, page_types, device)
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
