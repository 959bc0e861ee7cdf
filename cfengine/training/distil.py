"""Few-step distillation by distribution matching: the student's samples become as likely as the teacher finds them.

At a noise level of the sampler the flow-matching teacher predicts the mean of all clean chunks that fit: a blend of
every landmark that may appear. The student, a copy of the teacher at first, learns to answer with one of them. Its x0
after a random number of its own passes is noised again, and moved against the difference of two denoised versions:
that of a critic, which learns to denoise the student's samples, and that of the teacher (Yin et al., arXiv 2311.18828
and 2405.14867; with passes of the sampler and one that carries the gradient as in Huang et al., arXiv 2506.08009).
Student, critic and teacher see the same context. In half of the batches it turns, chunk by chunk, into what the
student samples by itself; in the others it is the truth or what the student's last pass makes of the noised truth, and
that pass is also held to the truth, without which colours pale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.training.data import Batch, Strips
from cfengine.training.diffusion import corrupt, draw_sequence, draw_sigmas, sampler_sigmas, spread
from cfengine.training.forward import Context, flow_from, remember
from cfengine.training.optimiser import schedule
from cfengine.training.parallel import draws, rank
from cfengine.training.state import Progress, World

COPIES = 2  # noise levels at which a sample is judged, and at which the critic learns from it
CRITIC_STEPS = 3  # for each of the student's, with its sample
ANCHOR = 1.0  # weight of redrawing the truth from the last noise level, which keeps colours and copies exact
ALONE = 0.5  # share of batches whose contexts become the student's own samples; the others stay near the truth
TURNS = 4  # steps with one batch, the first under true contexts
CRITIC_PACE = 2.0  # learning rate of the critic over that of the student
FLOOR = 0.1  # least size of the teacher's correction in the gradient's normalisation; latents have unit variance


def guess(world: World, context: Context, noisy: Tensor, sigma: Tensor, grad: bool = False) -> Tensor:
    """Flow of chunks (K, B, C, ...) at noise levels (K, B, C), in bfloat16.

    Each call has an autocast of its own: the weights it keeps from a call without gradient would pass none on.
    """
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        return flow_from(world.dit, context, noisy, 1000 * sigma)


def context_of(world: World, config: EngineConfig, latents: Tensor, concepts: Tensor) -> Context:
    """What chunks see of `latents` (B, C, ...) through the eyes of `world`; carries no gradient."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return remember(world.dit, config.memory, latents, world.table[concepts])


def sample(student: World, context: Context, levels: Tensor, graded: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Run the sampler's passes: x0 (1, B, C, ...) of pass `graded`, the only one with a gradient, and of the last."""
    x, kept = torch.randn(1, *shape), None
    for i, level in enumerate(levels.tolist()):
        flow = guess(student, context, x, torch.full(x.shape[:3], level), grad=i == graded)
        x0 = x - level * flow
        if i == graded:
            kept, x0 = x0, x0.detach()
        if i + 1 < len(levels):
            x = (1 - levels[i + 1]) * x0 + levels[i + 1] * torch.randn_like(x0)
    return kept, x0


def noised(x0: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x0 (1, B, C, ...) at COPIES random noise levels: x_t (K, B, C, ...), sigma (K, B, C), noise (K, B, C, ...)."""
    sigma = draw_sigmas((COPIES, *x0.shape[1:3]), sampler_sigmas()[1:], draw)
    noise = torch.randn(COPIES, *x0.shape[1:])
    return (1 - spread(sigma)) * x0 + spread(sigma) * noise, sigma, noise


@torch.no_grad()
def matching_gradient(
    critic: World, teacher: World, contexts: tuple[Context, Context], x0: Tensor, draw: np.random.Generator
) -> Tensor:
    """Where the student's sample x0 (1, B, C, ...) is likelier than it should be: (denoised by the critic - by the
    teacher) / mean |x0 - denoised by the teacher| of a chunk, averaged over noise levels (DMD, equation 8)."""
    noisy, sigma, _ = noised(x0, draw)
    fake, real = (
        noisy - spread(sigma) * guess(judge, context, noisy, sigma)
        for judge, context in zip((critic, teacher), contexts, strict=True)
    )
    size = (x0 - real).abs().mean(dim=(3, 4, 5, 6), keepdim=True).clamp(min=FLOOR)
    return ((fake - real) / size).mean(0, keepdim=True)


def critic_loss(critic: World, context: Context, x0: Tensor, draw: np.random.Generator) -> Tensor:
    """Flow matching on the student's samples x0 (1, B, C, ...)."""
    noisy, sigma, noise = noised(x0, draw)
    return (guess(critic, context, noisy, sigma, grad=True) - (noise - x0)).square().mean()


class Made(NamedTuple):
    """What a step made: the student's samples (B, C, ...), the truth as its last pass redraws it, means to report."""

    sample: Tensor
    redrawn: Tensor | None
    measures: dict[str, float]


class Distillation:
    """Student, critic and teacher, and one step of the first two."""

    def __init__(self, teacher: World, config: EngineConfig) -> None:
        self.teacher, self.config = teacher, config
        self.student = Progress(copy.deepcopy(teacher).requires_grad_(True), decay=0.99)
        self.critic = Progress(copy.deepcopy(teacher).requires_grad_(True), decay=0.9)
        self.levels = sampler_sigmas(config.sampler)

    def step(self, batch: Batch, latents: Tensor, lr: float, graded: int, draw, *, anchored: bool) -> Made:
        """Update student and critic under the context `latents` (B, C, ...); `graded`: pass that learns."""
        student, critic = self.student.world, self.critic.world
        own, theirs, real = (
            context_of(world, self.config, latents, batch.concepts) for world in (student, critic, self.teacher)
        )
        x0, final = sample(student, own, self.levels, graded, latents.shape)
        gradient = matching_gradient(critic, self.teacher, (theirs, real), x0.detach(), draw)
        (x0 * gradient).mean().backward()
        measures = {"gradient": gradient.abs().mean().item()}
        redrawn = None
        if anchored:
            redrawn = self.redrawn(own, batch.latents)
            anchor = (redrawn - batch.latents).square().mean()
            (ANCHOR * anchor).backward()
            redrawn, measures["anchor"] = redrawn.detach(), anchor.item()
        self.student.advance(lr)
        for turn in range(CRITIC_STEPS):
            if turn:
                theirs = context_of(critic, self.config, latents, batch.concepts)
            loss = critic_loss(critic, theirs, x0.detach(), draw)
            loss.backward()
            self.critic.advance(CRITIC_PACE * lr)
        measures["critic"] = loss.item()
        return Made(final[0], redrawn, measures)

    def redrawn(self, own: Context, truth: Tensor) -> Tensor:
        """True chunks (B, C, ...) as the student's last pass redraws them; carries the gradient."""
        level = self.levels[-1]
        noisy = ((1 - level) * truth + level * torch.randn_like(truth))[None]
        return (noisy - level * guess(self.student.world, own, noisy, level.expand(noisy.shape[:3]), grad=True))[0]


def continued(latents: Tensor, made: Tensor, turn: int) -> Tensor:
    """Put samples `made` in place of every second chunk of a context (B, C, ...), the others the next time.

    A chunk sees the chunk before it, so a sample in the context of the next one continues what that sample saw: a
    sequence that the student made by itself, one chunk deeper with every turn. Chunk 0, the sink, stays.
    """
    chunk = torch.arange(latents.shape[1])
    replaced = ((chunk + turn) % 2 == 0) & (chunk > 0)
    return torch.where(replaced[:, None, None, None, None], made, latents)


def train_distil(
    out: Path,
    teacher: World,
    config: EngineConfig,
    strips: Strips,
    seed: int,
    steps: int,
    report: Callable[[str, dict], None],
    *,
    peak: float = 2.5e-4,
) -> None:
    """Distil to `steps` steps, in whole batches, going on from `out` where it exists; the state stays there."""
    work = Distillation(teacher, config)
    kept = out.with_name(f"{out.stem}-critic{out.suffix}")
    progress, means = work.student, {}
    if progress.resume(out):
        work.critic.resume(kept)
    while progress.step < steps:
        common, draw = draws(seed, progress.step)
        batch = draw_sequence(strips, 0.4, common, draw)
        alone = common.random() < ALONE
        latents = truth = corrupt(batch.latents, None, draw)
        first = int(common.integers(2))
        for turn in range(TURNS):
            lr, graded = schedule(progress.step, steps, peak, 40), int(common.integers(len(work.levels)))
            made = work.step(batch, latents, lr, graded, draw, anchored=not alone)
            if alone:
                latents = continued(latents, made.sample, first + turn)
            else:
                latents = corrupt(truth, made.redrawn, draw)
            means |= {name: 0.95 * means.get(name, new) + 0.05 * new for name, new in made.measures.items()}
            if rank() == 0 and progress.step % 10 == 0:
                report("distil", {"step": progress.step, "of": steps, **means})
        if rank() == 0 and (progress.step >= steps or progress.step % (10 * TURNS) == 0):
            progress.save(out)
            work.critic.save(kept)
