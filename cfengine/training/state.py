"""What a training stage keeps between runs: network, averaged network, optimiser and step."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import nn

from cfengine.config import ModelConfig
from cfengine.errors import CheckpointError
from cfengine.model.dit import CausalDiT
from cfengine.model.text_tiny import CONCEPTS
from cfengine.training.optimiser import Both
from cfengine.training.parallel import average_gradients


class World(nn.Module):
    """The two nets that are trained together: the transformer and the table of concept vectors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dit = CausalDiT(config)
        self.table = nn.Parameter(torch.randn(len(CONCEPTS), config.text_dim))
        nn.init.zeros_(self.dit.head.head.weight)
        nn.init.zeros_(self.dit.head.head.bias)
        for block in self.dit.blocks:
            for linear in (block.self_attn.q, block.self_attn.k, block.self_attn.v):
                nn.init.zeros_(linear.bias)

    def optimiser(self) -> Both:
        """Muon for the matrices of the blocks, AdamW for the rest."""
        matrices = [p for p in self.dit.blocks.parameters() if p.dim() == 2]
        chosen = {id(p) for p in matrices}
        return Both(matrices, [p for p in self.parameters() if id(p) not in chosen])


class Progress:
    """A network in training with its exponential average; `save` and `resume` make a stage restartable."""

    def __init__(self, world: World, decay: float) -> None:
        self.world, self.average = world, copy.deepcopy(world).requires_grad_(False)
        self.optimiser = world.optimiser()
        self.step, self.decay = 0, decay

    @torch.no_grad()
    def advance(self, lr: float) -> None:
        """One optimiser step with the gradients of all processes, one step of the average (short-lived at first)."""
        average_gradients(self.world.parameters())
        self.optimiser.step(lr)
        self.step += 1
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
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
        state = torch.load(path, weights_only=True)
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
