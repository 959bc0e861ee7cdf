"""One step of teacher and student on meta tensors: what a training would take, without taking it.

Nothing is computed, so nothing is learned about activations, kernels or speed: sizes are those of what outlives a step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cfengine.config import EngineConfig
from cfengine.model.text_tiny import GROUPS
from cfengine.training.data import Batch
from cfengine.training.diffusion import COPIES, training_step
from cfengine.training.distil import Distillation
from cfengine.training.recipe import new_world
from cfengine.training.settings import Settings
from cfengine.training.state import Progress, World

META = torch.device("meta")


class Cost(NamedTuple):
    """What a step of one process takes.

    tokens: of its truth, before copies at several noise levels      networks: with weights in memory
    bytes: of weights, gradients, optimiser and averages      flops: forward and backward, of products and attention
    """

    stage: str
    sessions: int
    chunks: int
    parameters: int
    tokens: int
    networks: int
    weights: int
    gradients: int
    optimiser: int
    averages: int
    flops: int


def batch_of(config: EngineConfig, sessions: int, chunks: int, worded: bool) -> Batch:
    """A batch without values; prompts as long as the model takes them."""
    video, model = config.video, config.model
    shape = (config.memory.chunk_frames, model.in_channels, video.latent_height, video.latent_width)
    latents = torch.empty(sessions, chunks, *shape, device=META)
    if worded:
        prompts = torch.empty(sessions, chunks, len(GROUPS), dtype=torch.long, device=META)
    else:
        prompts = torch.empty(sessions, chunks, model.text_len, model.text_dim, device=META)
    return Batch(latents, prompts, None)


def _bytes(tensors) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _cost(stage: str, batch: Batch, config: EngineConfig, progress: list[Progress], others: list[World], flops) -> Cost:
    """`progress`: networks that learn; `others`: that only judge."""
    sessions, chunks = batch.latents.shape[:2]
    learning = [p for part in progress for p in part.world.parameters()]
    held = [tensor for part in progress for one in part.optimiser.parts for tensor in _held(one)]
    return Cost(
        stage,
        sessions,
        chunks,
        parameters=sum(p.numel() for p in progress[0].world.parameters()),
        tokens=sessions * chunks * config.memory.chunk_frames * config.page_tokens,
        networks=len(progress) + len(others),
        weights=_bytes([*learning, *(p for world in others for p in world.parameters())]),
        gradients=_bytes(learning),
        optimiser=_bytes(held),
        averages=_bytes(p for part in progress for p in part.average.parameters()),
        flops=flops,
    )


def _held(optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Tensors that an optimiser keeps for parameters."""
    return [value for state in optimiser.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def teacher_step(settings: Settings) -> Cost:
    """Forward, backward, optimiser and average of the teacher at its longest session."""
    config, longest = settings.config, max(settings.teacher.lengths, key=lambda length: length.chunks)
    progress = Progress(_world(settings), settings.teacher)
    batch = batch_of(config, longest.sessions, longest.chunks, settings.worded)
    with FlopCounterMode(display=False) as counter:
        loss, _ = training_step(progress.world, config, batch, batch.latents, np.random.default_rng(0))
        loss.backward()
    progress.advance()
    return _cost("teacher", batch, config, [progress], [], counter.get_total_flops())


def student_step(settings: Settings) -> Cost:
    """A step of the student and those of its critic at the longest horizon; the rollout before it is not counted."""
    config, student = settings.config, settings.student
    teacher = _world(settings).requires_grad_(False)
    work = Distillation(teacher, config, student)
    chunks = student.long[-1]
    batch = batch_of(config, student.sessions(chunks), chunks, settings.worded)
    graded, draw = 0, np.random.default_rng(0)  # the pass that costs most, where judges are asked about it
    with FlopCounterMode(display=False) as counter:
        work.step(batch, batch.latents, graded, draw, anchored=student.alone < 1)
    return _cost("student", batch, config, [work.student, work.critic], [teacher], counter.get_total_flops())


def _world(settings: Settings) -> World:
    with META:
        return new_world(settings.config)


def table(costs: list[Cost]) -> str:
    """Lines to read."""
    gib = 2**30
    lines = []
    for cost in costs:
        sizes = (cost.weights, cost.gradients, cost.optimiser, cost.averages)
        lines += [
            f"{cost.stage}: {cost.parameters / 1e6:.1f} million parameters, {cost.networks} networks of that size",
            f"  a step of one process   {cost.sessions} x {cost.chunks} chunks, {cost.tokens:,} tokens "
            f"(times {COPIES} noise levels)",
            "  GiB that outlive it     "
            + ", ".join(
                f"{name} {size / gib:.2f}"
                for name, size in zip(("weights", "gradients", "optimiser", "averages"), sizes, strict=True)
            )
            + f"; together {sum(sizes) / gib:.2f}",
            f"  products and attention  {cost.flops / 1e12:,.2f} TFLOP",
        ]
    lines.append("Not counted: activations; the rollout before a student's step; reading and writing.")
    return "\n".join(lines)
