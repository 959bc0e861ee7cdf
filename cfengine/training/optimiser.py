"""Optimiser of the small world: orthogonalised momentum for weight matrices, AdamW for the rest.

Matrices take the momentum's nearest semi-orthogonal matrix as their step (Muon, Jordan et al. 2024, with the
coefficients published there), scaled to the size of an Adam step (Liu et al., arXiv 2502.16982: 0.2 sqrt(max side)).
It needs about half the steps of AdamW here, which matters on two cores.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cfengine.training.settings import Descent

WEIGHT_DECAY = 0.01  # of matrices


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Map every singular value of (n, rows, columns) close to 1 by a quintic Newton-Schulz iteration, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Steps of orthogonalised Nesterov momentum for parameters with two or more axes (the first against the others)."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all parameters; matrices of one shape are handled together."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                alike[update.shape[0], update.shape[1]].append((p, update))
            for (rows, columns), members in alike.items():
                updates = orthogonalise(torch.stack([update for _, update in members]))
                size = 0.2 * math.sqrt(max(rows, columns))
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * size)


class Both:
    """Muon for the matrices inside a network, AdamW for everything else, one learning rate."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        clip: float = 1.0,
    ) -> None:
        """matrices: may be none      betas: of AdamW      clip: norm of the gradient of all"""
        muon = [Muon(matrices, lr=0.0, weight_decay=WEIGHT_DECAY)] if matrices else []
        self.parts = (*muon, torch.optim.AdamW(others, lr=0.0, betas=betas, weight_decay=0.0))
        self.clip = clip

    def step(self, lr: float) -> None:
        """Clip gradients, update with `lr`, forget the gradients."""
        parameters = [p for part in self.parts for group in part.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule(step: int, of: Descent) -> float:
    """Learning rate: a linear warm-up, times a cosine from the peak to 2 % of it (or times the peak alone)."""
    fall = 1.0 if of.constant else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / of.steps)))
    return of.peak * min(1.0, (step + 1) / of.warm) * fall
