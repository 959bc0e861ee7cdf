"""Few-step distillation: the student's x0 becomes the end of the teacher's own path.

At a noise level of the sampler the flow-matching teacher predicts the mean of all clean chunks that fit, which is a
blur where the future is open. Its probability-flow path from the same x_t ends in one of them. The student starts as
a copy of the teacher and regresses to that end from each of the sampler's four levels (consistency distillation,
Song et al., arXiv 2303.01469, with the path walked instead of bootstrapped). Contexts carry the student's own errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.training.data import Strips
from cfengine.training.diffusion import COPIES, corrupt, draw_sequence, sampler_sigmas, spread
from cfengine.training.forward import flow
from cfengine.training.optimiser import schedule
from cfengine.training.parallel import draws, rank
from cfengine.training.state import Progress, World

PATH_STEPS = 6


@torch.no_grad()
def path_end(
    teacher: World,
    config: EngineConfig,
    context: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    text: Tensor,
    steps: int = PATH_STEPS,
) -> Tensor:
    """Follow dx = v dsigma from `sigma` (K, B, C) to 0, in Euler steps that are even before the warp."""
    shift = config.sampler.shift
    u = sigma / (shift - (shift - 1) * sigma)
    x, now = noisy, sigma
    for step in range(1, steps + 1):
        left = u * (1 - step / steps)
        then = shift * left / (1 + (shift - 1) * left)
        x = x + spread(then - now) * flow(teacher.dit, config.memory, context, x, 1000 * now, text)
        now = then
    return x


def distil_step(
    student: World,
    teacher: World,
    config: EngineConfig,
    truth: Tensor,
    concepts: Tensor,
    context: Tensor,
    start: Tensor,
    draw,
) -> tuple[Tensor, Tensor]:
    """Loss of one step, and the student's x0 through the last noise level of the sampler.

    truth, context: (B, C, ...)      start: (B, C, ...), what the noise is added to: truth, or the student's own x0
    """
    B, C = truth.shape[:2]
    levels = sampler_sigmas(config)
    last = torch.full((1, B, C), float(levels[-1]))
    others = levels[torch.from_numpy(draw.integers(len(levels), size=(COPIES - 1, B, C)))]
    sigma = torch.cat([last, others])
    noisy = (1 - spread(sigma)) * start + spread(sigma) * torch.randn(COPIES, *truth.shape)
    with torch.autocast("cpu", torch.bfloat16):
        end = path_end(teacher, config, context, noisy, sigma, teacher.table[concepts])
        guess = flow(student.dit, config.memory, context, noisy, 1000 * sigma, student.table[concepts])
    made = noisy - spread(sigma) * guess
    loss = ((made - end) / spread(sigma)).square().mean()
    return loss, made[0].detach()


def train_distil(
    out: Path,
    teacher: World,
    config: EngineConfig,
    strips: Strips,
    seed: int,
    steps: int,
    report: Callable[[str, dict], None],
    *,
    peak: float = 5e-4,
) -> None:
    """Distil to `steps` steps, going on from `out` where it exists, and leave the state there."""
    torch.manual_seed(seed)
    progress = Progress(copy.deepcopy(teacher).requires_grad_(True), decay=0.99)
    progress.resume(out)
    mean = None
    while progress.step < steps:
        common, draw = draws(seed, progress.step)
        batch = draw_sequence(strips, 1.0, common, draw)
        made = None
        for _ in range(3):
            context = corrupt(batch.latents, made, draw)
            own = made is not None and draw.random() < 0.5
            start = made if own else batch.latents
            loss, made = distil_step(
                progress.world, teacher, config, batch.latents, batch.concepts, context, start, draw
            )
            loss.backward()
            progress.advance(schedule(progress.step, steps, peak, 20))
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            if rank() == 0 and progress.step % 10 == 0:
                report("distil", {"step": progress.step, "of": steps, "loss": mean})
            if rank() == 0 and progress.step % 60 == 0:
                progress.save(out)
    if rank() == 0:
        progress.save(out)
