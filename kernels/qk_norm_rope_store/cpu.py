"""RMS norm of queries and keys, spatial rotation and the write into pages on the CPU, compiled."""

from __future__ import annotations

from functools import lru_cache

import torch

from cfengine import _C

from ..operands import FLOATS, check_divides, check_size, check_tensor, float_vector, refuse_fp8
from ..rope import axis_pairs, spatial_table

OP = "qk_norm_rope_store"


@lru_cache(maxsize=32)
def turn_table(rows: int, columns: int, head_dim: int, theta: float) -> torch.Tensor:
    """(rows * columns, 2, head_dim) float32: cosine of each channel's pair, then sine as (-s, s); time pairs stay."""
    table = spatial_table(rows, columns, head_dim, theta)
    turns = torch.zeros(rows * columns, 2, head_dim // 2, 2)
    turns[:, 0] = 1.0
    turns[:, 0, axis_pairs(head_dim)[0] :] = table[..., :1]
    turns[:, 1, axis_pairs(head_dim)[0] :] = table[..., 1:] * torch.tensor([-1.0, 1.0])
    return turns.flatten(2)


def qk_norm_rope_store(
    q, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, grid, *, eps: float = 1e-6, theta: float = 10000.0,
    k_scale=None, v_scale=None,
):  # fmt: skip
    """See `reference.qk_norm_rope_store`. float32 or bfloat16, one type for all of q, k, v and the pages."""
    refuse_fp8(OP, k_scale is not None or v_scale is not None)
    check_tensor(OP, "k", k, 2, FLOATS)
    check_tensor(OP, "v", v, 2, (k.dtype,))
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_tensor(OP, name, pages, 4, (k.dtype,))
    check_tensor(OP, "page_ids", page_ids, 1, (torch.int32,))
    pages, page_tokens, heads, head_dim = k_pages.shape
    tokens, dim = k.shape
    for axis, what in enumerate(("pages", "page_tokens", "heads", "head_dim")):
        check_size(OP, f"{what} of v_pages", v_pages.shape[axis], k_pages.shape[axis], f"{what} of k_pages")
    check_size(OP, "width of k", dim, heads * head_dim, "heads x head_dim of k_pages")
    check_size(OP, "rows x columns of grid", grid[0] * grid[1], page_tokens, "page_tokens of k_pages")
    check_size(OP, "tokens of k", tokens, page_ids.shape[0] * page_tokens, "pages in page_ids x page_tokens")
    check_divides(OP, "head_dim", head_dim, "a rotary pair of", 2)
    for name, other in (("q", q), ("v", v)):
        if other is not None:
            check_tensor(OP, name, other, 2, (k.dtype,))
            check_size(OP, f"tokens of {name}", other.shape[0], tokens, "tokens of k")
            check_size(OP, f"width of {name}", other.shape[1], dim, "width of k")
    norm_k = float_vector(OP, "norm_k", norm_k, dim)
    out, query = None, (0, 0)
    if q is not None:
        norm_q = float_vector(OP, "norm_q", norm_q, dim)
        out, query = torch.empty((tokens, heads, head_dim), dtype=q.dtype), (q.data_ptr(), q.stride(0))
    mean = torch.empty(dim)
    turns = turn_table(*grid, head_dim, theta)
    _C.qk_norm_rope_store(
        *query, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
        0 if q is None else norm_q.data_ptr(), norm_k.data_ptr(),
        k_pages.data_ptr(), k_pages.stride()[:3], v_pages.data_ptr(), v_pages.stride()[:3],
        page_ids.data_ptr(), turns.data_ptr(), 0 if out is None else out.data_ptr(), mean.data_ptr(),
        tokens, page_ids.shape[0], pages, page_tokens, heads, head_dim, eps,
        k.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out, mean
