"""RMS norm of queries and keys, spatial rotation, and the write of a chunk's keys and values into pages."""

from __future__ import annotations

import torch

from ..fp8 import quantise
from ..rope import axis_pairs, rotate, spatial_table


def put(pages, scale, ids, values) -> None:
    """Write values (frames, page_tokens, heads, head_dim) to pages `ids`; with `scale`, in e4m3 by page and head."""
    if scale is None:
        pages[ids] = values.to(pages.dtype)
        return
    rounded, sizes = quantise(values, (1, 3))
    bits = pages if pages.element_size() > 1 else pages.view(torch.uint8)  # an 8-bit float is indexed as bytes
    bits[ids] = rounded.view(torch.uint8) if bits is not pages else rounded.to(pages.dtype)
    scale[ids] = sizes[:, 0, :, 0].to(scale.dtype)


def qk_norm_rope_store(
    q, k, v, norm_q, norm_k, k_pages, v_pages, page_ids, grid, *, eps: float = 1e-6, theta: float = 10000.0,
    k_scale=None, v_scale=None,
):  # fmt: skip
    """q' = R_s rms(q) * norm_q;  page[page_ids[f]] = R_s rms(k) * norm_k, v of frame f;  mean of the unrotated keys.

    The norm spans the full model width (Wan 2.1: `qk_norm`), the rotation R_s rows and columns only.

    q, k, v: (tokens, dim), rows may be strided (slices of one fused projection); q may be None where only the
    pages are wanted (last block of a clean pass)      norm_q, norm_k: (dim,)
    k_pages, v_pages: (pages, page_tokens, heads, head_dim), written in place      page_ids: (chunk_frames,) int32
    grid: (rows, columns) of a page, rows * columns = page_tokens
    k_scale, v_scale: (pages, heads) float32 where pages are e4m3, written in place: page * scale is what is stored,
    with scale = (largest magnitude of a page and head) / 448
    -> q' (tokens, heads, head_dim) or None,  key mean (dim,) float32 over all tokens of the chunk, before rotation
    """
    _, page_tokens, heads, head_dim = k_pages.shape
    frames = page_ids.shape[0]
    table = spatial_table(*grid, head_dim, theta).to(k.device)
    angle = torch.atan2(table[..., 1].double(), table[..., 0].double())[:, None]  # (page_tokens, 1, pairs)
    time_pairs = axis_pairs(head_dim)[0]

    def norm(x, weight):
        wide = x.double() if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (scaled * weight.to(wide.dtype)).to(x.dtype)

    def spatial(x):
        return rotate(x.view(frames, page_tokens, heads, head_dim), angle, time_pairs)

    keys = norm(k, norm_k)
    mean = keys.to(torch.float64).mean(0).to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    ids = page_ids.long()
    put(k_pages, k_scale, ids, spatial(keys))
    put(v_pages, v_scale, ids, v.reshape(frames, page_tokens, heads, head_dim))
    if q is None:
        return None, mean
    return spatial(norm(q, norm_q)).reshape(-1, heads, head_dim), mean
