"""Attention of chunk tokens to the cached keys and values of a prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_attention(q, k, v, bias):
    """softmax(q . k / sqrt(head_dim) + bias) v.

    The reference pads a prompt of n tokens with zero rows to text_len and attends to all of them. The padded keys are
    equal, so they collapse exactly to one key with bias log(text_len - n).

    q: (tokens, heads, head_dim)      k, v: (keys, heads, head_dim)      bias: (keys,) float32
    -> (tokens, heads, head_dim) in q's type
    """
    query, key, value = (t.transpose(0, 1)[None] for t in (q, k, v))
    # the mask stays float32: in bfloat16 log(text_len - n) would be off by up to 1.6 % of the padding's weight
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = bias.to(wide).expand(q.shape[0], -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0].transpose(0, 1)
