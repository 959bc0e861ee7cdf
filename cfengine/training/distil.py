"""Few-step distillation: the student's x0 becomes the end of the teacher's own path.

At a noise level of the sampler the flow-matching teacher predicts the mean of all clean chunks that fit, which has no
landmark where one may or may not appear. Its probability-flow path from the same x_t ends in one of them. The student
starts as a copy of the teacher and regresses to that end from each of the sampler's levels (the idea of consistency
models, Song et al., arXiv 2303.01469, with the path walked instead of bootstrapped). One path from pure noise passes
all levels and serves them all. Other batches begin at a lower level from what the student itself made, re-noised, as
the sampler does. Contexts carry the student's own errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.training.data import Strips
from cfengine.training.diffusion import corrupt, draw_sequence, sampler_sigmas, spread
from cfengine.training.forward import Context, flow_from, remember
from cfengine.training.optimiser import schedule
from cfengine.training.parallel import draws, rank
from cfengine.training.state import Progress, World

BETWEEN = 2  # Euler steps from one level of the sampler to the next
TAIL = 3  # Euler steps from the last level to zero


def path_levels(levels: Tensor) -> list[float]:
    """Noise levels of a path: those of the sampler, with even steps between them, down to zero."""
    path: list[float] = []
    for high, low in zip(levels.tolist(), levels.tolist()[1:], strict=False):
        path += [high + (low - high) * i / BETWEEN for i in range(BETWEEN)]
    last = float(levels[-1])
    return path + [last * (1 - i / TAIL) for i in range(TAIL)] + [0.0]


@torch.no_grad()
def walk_path(teacher: World, context: Context, x: Tensor, path: list[float], levels: Tensor) -> tuple[Tensor, Tensor]:
    """Follow dx = v dsigma along `path` by Euler steps; x (1, B, C, ...) at path[0].

    -> x at every sampler level on the way (n, B, C, ...), and the end (1, B, C, ...)
    """
    known = {round(level, 5) for level in levels.tolist()}
    passed = []
    for now, then in zip(path, path[1:], strict=False):
        if round(now, 5) in known:
            passed.append(x)
        timestep = torch.full(x.shape[:3], 1000 * now)
        x = x + (then - now) * flow_from(teacher.dit, context, x, timestep)
    return torch.cat(passed), x


def distil_step(
    student: World, teacher: World, config: EngineConfig, context: Tensor, concepts: Tensor, begun: Tensor | None, draw
) -> tuple[Tensor, Tensor]:
    """Loss of one step, and the student's x0 (B, C, ...) at the sampler's last level.

    context: (B, C, ...) latents      begun: the student's x0 of an earlier step, to be re-noised; None: pure noise
    """
    B, C = context.shape[:2]
    levels = sampler_sigmas(config)
    first = 0 if begun is None else int(draw.integers(1, len(levels)))
    levels = levels[first:]
    path = path_levels(levels)
    noise = torch.randn(1, *context.shape)
    x = noise if begun is None else (1 - path[0]) * begun + path[0] * noise
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            known = remember(teacher.dit, config.memory, context, teacher.table[concepts])
        passed, end = walk_path(teacher, known, x, path, levels)
        own = remember(student.dit, config.memory, context, student.table[concepts])
        sigma = levels[:, None, None].expand(-1, B, C)
        guess = flow_from(student.dit, own, passed, 1000 * sigma)
    made = passed - spread(sigma) * guess
    loss = ((made - end) / spread(sigma)).square().mean()
    return loss, made[-1].detach()


def train_distil(
    out: Path,
    teacher: World,
    config: EngineConfig,
    strips: Strips,
    seed: int,
    steps: int,
    report: Callable[[str, dict], None],
    *,
    peak: float = 1e-3,
) -> None:
    """Distil to `steps` steps, going on from `out` where it exists, and leave the state there."""
    progress = Progress(copy.deepcopy(teacher).requires_grad_(True), decay=0.99)
    progress.resume(out)
    mean = None
    while progress.step < steps:
        common, draw = draws(seed, progress.step)
        batch = draw_sequence(strips, 0.4, common, draw)
        made = context = None
        for turn in range(4):  # noise, its re-noised result under the same context, then both again with errors
            again = turn % 2 == 1
            if not again:
                context = corrupt(batch.latents, made, draw)
            begun = made if again else None
            loss, made = distil_step(progress.world, teacher, config, context, batch.concepts, begun, draw)
            loss.backward()
            progress.advance(schedule(progress.step, steps, peak, 20))
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            if rank() == 0 and progress.step % 10 == 0:
                report("distil", {"step": progress.step, "of": steps, "loss": mean})
            if rank() == 0 and progress.step % 60 == 0:
                progress.save(out)
    if rank() == 0:
        progress.save(out)
