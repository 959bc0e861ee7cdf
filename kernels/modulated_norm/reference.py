"""Layer norm without affine, scaled and shifted per latent frame."""

from __future__ import annotations

import torch

from ..quantise_rows.reference import quantise_rows


def modulated_norm(x, shift, scale, *, eps: float = 1e-6, fp8: bool = False):
    """(x - mean) / sqrt(var + eps) * (1 + scale) + shift, with one shift and scale per latent frame.

    x: (tokens, dim), frame-major      shift, scale: (frames, dim), frames divides tokens
    -> (tokens, dim) in x's type; computed in float32 (float64 for float64 input).  fp8: the result, before it is
    rounded to x's type, as e4m3 `Rows` instead
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    frames = shift.shape[0]
    normed = torch.nn.functional.layer_norm(x.to(wide), (x.shape[-1],), eps=eps).unflatten(0, (frames, -1))
    out = (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).flatten(0, 1)
    return quantise_rows(out) if fp8 else out.to(x.dtype)
