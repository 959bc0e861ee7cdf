"""Error recycling: contexts that carry what the model itself got wrong, while its target stays the truth.

A model that only ever continues true frames takes its own small errors for the truth later and lets them grow.
Context Forcing (arXiv 2602.06028) perturbs the context of its teacher with residuals from a bank. Here a chunk of the
context is either what the model has just made of it, or carries a residual of another chunk from the bank, or a little
noise.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfengine.training.parallel import rank

SIZE = 256  # residuals that a bank holds


class ErrorBank:
    """The model's latest residuals: what it made of a chunk, minus the truth; each process has its own.

    errors: (n, c, channels, h, w) float16, n up to SIZE
    """

    def __init__(self, share: float) -> None:
        """share: probability with which a chunk of the context carries a residual"""
        self.share, self.errors = share, torch.zeros(0)

    def add(self, truth: Tensor, context: Tensor, made: Tensor, draw: np.random.Generator) -> None:
        """Keep the residuals (B, C, ...) of chunks that were made anew; a full bank lets random ones go for them."""
        fresh = (made - truth)[(made != context).flatten(2).any(-1)].to("cpu", torch.float16)
        room = SIZE - len(self.errors)
        self.errors = torch.cat([self.errors.view(-1, *fresh.shape[1:]), fresh[:room]]).half()
        left = fresh[room:][:SIZE]
        self.errors[torch.from_numpy(draw.permutation(SIZE)[: len(left)])] = left

    def spoil(self, context: Tensor, draw: np.random.Generator) -> Tensor:
        """Add residuals to random chunks (B, C, ...); nothing while the bank is empty."""
        B, C = context.shape[:2]
        chosen = draw.random((B, C)) < self.share
        if not len(self.errors):
            return context
        picked = self.errors[torch.from_numpy(draw.integers(len(self.errors), size=B * C))].to(context)
        return context + picked.view(context.shape) * mask(chosen, context)

    def save(self, out: Path) -> None:
        """Leave the bank beside the state `out`."""
        path = bank_file(out)
        torch.save({"errors": self.errors}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def resume(self, out: Path) -> None:
        """Go on with what was left there, if anything was."""
        if bank_file(out).exists():
            self.errors = torch.load(bank_file(out), weights_only=True)["errors"]


def bank_file(out: Path) -> Path:
    """Where the bank of this process lies."""
    return out.with_name(f"{out.stem}-errors{rank()}{out.suffix}")


def mask(chosen: np.ndarray, like: Tensor) -> Tensor:
    """(B, C) bool -> (B, C, 1, 1, 1, 1) of 0 and 1."""
    return torch.from_numpy(chosen).to(like)[..., None, None, None, None]


def corrupt(truth: Tensor, made: Tensor | None, draw: np.random.Generator, bank: ErrorBank | None = None) -> Tensor:
    """Context latents (B, C, ...): in some chunks what the model made, a residual of the bank, or a little noise."""
    B, C = truth.shape[:2]
    context = bank.spoil(truth, draw) if bank else truth
    if made is not None:
        own = draw.random((B, C)) < draw.choice([0.3, 0.7, 1.0])
        context = torch.where(mask(own, truth).bool(), made, context)
    amount = 0.1 * draw.random((B, C)) * (draw.random((B, C)) < 0.4)
    return context + mask(amount, truth) * torch.randn_like(truth)
