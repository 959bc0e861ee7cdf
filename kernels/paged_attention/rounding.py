"""What attention on fp8 tensor cores rounds beside its pages, in plain torch: to measure its error without a GPU."""

from __future__ import annotations

import torch

from ..fp8 import E4M3, LARGEST, LEAST
from ..rope import axis_frequencies, axis_pairs, rotate
from .reference import paged_attention as reference
from .reference import shown

BOOST = 256.0  # of the weights, the largest of which is 1, before they are rounded


def paged_attention(
    q, k_pages, v_pages, page_ids, positions, count, q_positions, *, theta: float = 10000.0, k_scale=None, v_scale=None,
    wide: bool = False,
):  # fmt: skip
    """`reference.paged_attention` with, where pages are e4m3 and not `wide`, turned queries and weights rounded too.

    A row of a query has one scale, sqrt(2) * max|q| / 448 before it is turned: a turn brings two channels into one. The
    weights are exp(score - largest score) * 256. A kernel that meets the largest score late rounds earlier weights by
    another power of two or so, which changes the error little.
    """
    if wide or k_scale is None:
        table = (page_ids, positions, count, q_positions)
        return reference(q, k_pages, v_pages, *table, theta=theta, k_scale=k_scale, v_scale=v_scale)
    tokens, heads, head_dim = q.shape
    frames, valid = q_positions.shape[0], int(count)
    ids = page_ids[:valid].long()
    query = q.float().view(frames, tokens // frames, heads, head_dim)
    size = query.abs().amax(-1, keepdim=True).clamp_min(LEAST) * (2**0.5 / LARGEST)
    rate = axis_frequencies(axis_pairs(head_dim)[0], theta).to(q.device)
    keys, values = (shown(pages, None, ids, torch.float32) for pages in (k_pages.float(), v_pages.float()))
    scores = []
    for slot in range(valid):
        delta = (q_positions.double() - positions[slot].double())[:, None, None, None] * rate
        turned = (rotate(query, delta, 0) / size).to(E4M3).float() * size
        unit = k_scale[ids[slot]] * head_dim**-0.5
        scores.append(torch.einsum("qhd,khd->hqk", turned.flatten(0, 1), keys[slot]) * unit[:, None, None])
    score = torch.stack(scores, 2)  # heads, tokens, slots, page_tokens
    weight = (score - score.amax((2, 3), keepdim=True)).exp()
    rounded = (weight * BOOST).to(E4M3).float() / BOOST
    sums = torch.einsum("hqsk,skhd,sh->qhd", rounded, values, v_scale[ids])
    return (sums / weight.sum((2, 3)).T[..., None]).to(q.dtype)
