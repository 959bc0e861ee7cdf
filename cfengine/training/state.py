"""What a training stage keeps between runs: network, averaged network, optimiser and step."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from cfengine.config import ModelConfig
from cfengine.errors import CheckpointError
from cfengine.model.dit import CausalDiT
from cfengine.model.text_tiny import CONCEPTS
from cfengine.training.optimiser import Both, schedule
from cfengine.training.parallel import average_gradients
from cfengine.training.settings import Descent


class World(nn.Module):
    """The two nets that are trained together: the transformer and the table of concept vectors."""

    def __init__(self, config: ModelConfig, words: int = len(CONCEPTS)) -> None:
        """words: rows of the table; 0 where batches bring the rows of a text encoder"""
        super().__init__()
        self.dit = CausalDiT(config)
        self.table = nn.Parameter(torch.randn(words, config.text_dim))
        nn.init.zeros_(self.dit.head.head.weight)
        nn.init.zeros_(self.dit.head.head.bias)
        for block in self.dit.blocks:
            for linear in (block.self_attn.q, block.self_attn.k, block.self_attn.v):
                nn.init.zeros_(linear.bias)

    def text(self, prompts: Tensor) -> Tensor:
        """Rows (..., n, text_dim) of concept numbers (..., n); rows of a text encoder stay what they are."""
        return prompts if prompts.is_floating_point() else self.table[prompts]

    def optimiser(self, settings: Descent) -> Both:
        """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for everything."""
        matrices = [p for p in self.dit.blocks.parameters() if p.dim() == 2 and settings.optimiser == "muon"]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.parameters() if id(p) not in chosen]
        return Both(matrices, others, betas=settings.betas, clip=settings.clip)


class Progress:
    """A network in training with its exponential average; `save` and `resume` make a stage restartable."""

    def __init__(self, world: World, settings: Descent) -> None:
        self.world, self.average = world, copy.deepcopy(world).requires_grad_(False)
        self.settings, self.optimiser, self.step = settings, world.optimiser(settings), 0

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return schedule(self.step, self.settings)

    @torch.no_grad()
    def advance(self, rate: float | None = None) -> None:
        """One optimiser step with the gradients of all processes, one step of the average (short-lived at first)."""
        average_gradients(self.world.parameters())
        self.optimiser.step(self.rate if rate is None else rate)
        self.step += 1
        keep = min(self.settings.decay, (1 + self.step) / (10 + self.step))
        keep = keep if self.step > self.settings.average_from else 0.0
        for mean, now in zip(self.average.parameters(), self.world.parameters(), strict=True):
            mean.lerp_(now, 1 - keep)

    def save(self, path: Path) -> None:
        """Write everything; a reader never sees half a file."""
        state = {
            "world": self.world.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def resume(self, path: Path) -> bool:
        """Go on from `path` if it exists."""
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.world.load_state_dict(state["world"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, KeyError, ValueError) as problem:
            raise CheckpointError(
                f"training state {path} is of another model ({problem}); delete it or choose another --out"
            ) from problem
        self.step = state["step"]
        return True
