"""Residual add with a gate per latent frame, fused with the norm that follows it."""

from __future__ import annotations

import torch

from ..modulated_norm.reference import modulated_norm


def gated_residual(x, y, gate=None, shift=None, scale=None, *, eps: float = 1e-6, fp8: bool = False):
    """x <- x + y * gate;  then, where shift and scale are given, also modulated_norm(x, shift, scale).

    x: (tokens, dim), updated in place      y: (tokens, dim)      gate, shift, scale: (frames, dim) or None (gate 1)
    -> x, normed (tokens, dim) or None.  The norm reads the sum rounded to x's type.  fp8: normed is e4m3 `Rows` instead
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    update = y.to(wide)
    if gate is not None:
        update = (update.unflatten(0, (gate.shape[0], -1)) * gate.to(wide)[:, None]).flatten(0, 1)
    x.copy_((x.to(wide) + update).to(x.dtype))
    return x, None if shift is None else modulated_norm(x, shift, scale, eps=eps, fp8=fp8)
