"""Few-step distillation by distribution matching, first local, then under the student's own long context.

At a noise level of the sampler the flow-matching teacher predicts the mean of all clean chunks that fit: a blend of
every landmark that may appear. The student, a copy of the teacher at first, learns to answer with one of them. Its x0
after a random number of its own passes is noised again, and moved against the difference of two denoised versions:
that of a critic, which learns to denoise the student's samples, and that of the teacher (Yin et al., arXiv 2311.18828
and 2405.14867; with passes of the sampler and one that carries the gradient as in Huang et al., arXiv 2506.08009).
The teacher is guided by itself as it was early in its training: it is moved on where the two differ, away from blends
that only the early one still makes (Karras et al., arXiv 2406.02507).

Student, critic and teacher see the same context. In ALONE of the batches it is a rollout: what the student makes chunk
by chunk through the engine's own passes and memory. Stage 1 rolls out as far as the window of a short teacher reaches;
stage 2 (contextual distribution matching, Context Forcing, arXiv 2602.06028) draws the length from a range that grows.
In the other batches the context is the truth, or what the student's last pass makes of the noised truth, and that pass
is also held to the truth, without which colours pale.
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
from cfengine.ops import Ops, select
from cfengine.scheduler.rollout import Rollout
from cfengine.training.data import Batch, Strips, draw_batch
from cfengine.training.diffusion import corrupt, draw_sigmas, sampler_sigmas, spread
from cfengine.training.forward import Context, flow_from, remember
from cfengine.training.optimiser import schedule
from cfengine.training.parallel import draws, rank
from cfengine.training.state import Progress, World

COPIES = 2  # noise levels at which a sample is judged, and at which the critic learns from it
LOCAL = 0.4  # share of the steps that stage 1 takes
SHORT = (2, 7)  # chunks of a rollout in stage 1; 7 are the 21 latent frames of the paper's local stage
LONG = (8, 12, 28)  # in stage 2: at least, at most when it begins, at most when it ends
CHUNKS = 16  # in a batch of one process: so many sessions that their chunks are about that
GUIDANCE = 1.0  # of the teacher by its early self; 0: none
CRITIC_STEPS = 5  # for each of the student's, with its sample
ANCHOR = 1.0  # weight of redrawing the truth from the last noise level, which keeps colours and copies exact
ALONE = 0.5  # share of batches whose contexts are the student's own rollouts; the others stay near the truth
GIVEN = 0.5  # share of rollouts that go on from true chunks, up to half of them
TURNS = 4  # steps with one batch
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


class Judges(NamedTuple):
    """Who denoises a sample: the critic, the teacher, and the teacher as it was early; in that order everywhere."""

    critic: World
    teacher: World
    early: World


@torch.no_grad()
def matching_gradient(judges: Judges, contexts: tuple[Context, ...], x0: Tensor, draw: np.random.Generator) -> Tensor:
    """Where the student's sample x0 (1, B, C, ...) is likelier than it should be: (denoised by the critic - by the
    guided teacher) / mean |x0 - denoised by the teacher| of a chunk, averaged over noise levels (DMD, equation 8).

    contexts: what each judge sees
    """
    noisy, sigma, _ = noised(x0, draw)
    fake, real, rough = (
        noisy - spread(sigma) * guess(judge, context, noisy, sigma)
        for judge, context in zip(judges, contexts, strict=True)
    )
    real = real + GUIDANCE * (real - rough)
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

    def __init__(self, teacher: World, early: World, config: EngineConfig) -> None:
        """early: the teacher as it was early in its training"""
        self.config = config
        self.student = Progress(copy.deepcopy(teacher).requires_grad_(True), decay=0.99)
        self.critic = Progress(copy.deepcopy(teacher).requires_grad_(True), decay=0.9)
        self.judges = Judges(self.critic.world, teacher, early)
        self.levels = sampler_sigmas(config.sampler)

    def step(self, batch: Batch, latents: Tensor, lr: float, graded: int, draw, *, anchored: bool) -> Made:
        """Update student and critic under the context `latents` (B, C, ...); `graded`: pass that learns."""
        student, critic = self.student.world, self.critic.world
        own, *seen = (context_of(world, self.config, latents, batch.concepts) for world in (student, *self.judges))
        x0, final = sample(student, own, self.levels, graded, latents.shape)
        gradient = matching_gradient(self.judges, tuple(seen), x0.detach(), draw)
        (x0 * gradient).mean().backward()
        measures = {"gradient": gradient.abs().mean().item()}
        redrawn = None
        if anchored:
            redrawn = self.redrawn(own, batch.latents)
            anchor = (redrawn - batch.latents).square().mean()
            (ANCHOR * anchor).backward()
            redrawn, measures["anchor"] = redrawn.detach(), anchor.item()
        self.student.advance(lr)
        for _ in range(CRITIC_STEPS):  # under the context as the critic saw it first: it carries no gradient anyway
            loss = critic_loss(critic, seen[0], x0.detach(), draw)
            loss.backward()
            self.critic.advance(CRITIC_PACE * lr)
        measures["critic"] = loss.item()
        return Made(final[0], redrawn, measures)

    def redrawn(self, own: Context, truth: Tensor) -> Tensor:
        """True chunks (B, C, ...) as the student's last pass redraws them; carries the gradient."""
        level = self.levels[-1]
        noisy = ((1 - level) * truth + level * torch.randn_like(truth))[None]
        return (noisy - level * guess(self.student.world, own, noisy, level.expand(noisy.shape[:3]), grad=True))[0]


def horizon(share: float, common: np.random.Generator) -> int:
    """Chunks of a session when `share` of the steps are done: the same in all processes."""
    if share < LOCAL:
        return int(common.integers(SHORT[0], SHORT[1] + 1))
    least, first, last = LONG
    most = first + (last - first) * (share - LOCAL) / (1 - LOCAL)
    return int(common.integers(least, round(most) + 1))


def roll_out(student: World, config: EngineConfig, ops: Ops, batch: Batch, given: int, seeds: list[int]) -> Tensor:
    """Latents (B, C, ...) of sessions with a batch's prompts: `given` true chunks, then what the student makes of them.

    Chunk by chunk, as the engine streams: passes of the sampler, the clean pass, the memory's own rule.
    """
    model = copy.deepcopy(student.dit).prepare()
    rollout = Rollout(model, config, ops, lambda concepts: model.project_text(student.table[list(concepts)]), seeds)
    parts = []
    for chunk in range(batch.latents.shape[1]):
        prompts = [tuple(row) for row in batch.concepts[:, chunk].tolist()]
        if chunk < given:
            rollout.prime(batch.latents[:, chunk], prompts)
        else:
            rollout.step(prompts)
        parts.append(rollout.latents)
    return torch.stack(parts, 1)


def train_distil(
    out: Path,
    teacher: World,
    early: World,
    config: EngineConfig,
    strips: Strips,
    seed: int,
    steps: int,
    report: Callable[[str, dict], None],
    *,
    peak: float = 2.5e-4,
) -> None:
    """Distil `teacher`, guided by its `early` self, to `steps` steps, in whole batches.

    Goes on from `out` where it exists; the state stays there.
    """
    work = Distillation(teacher, early, config)
    kept = out.with_name(f"{out.stem}-critic{out.suffix}")
    progress, means, ops = work.student, {}, select("cpu")
    if progress.resume(out):
        work.critic.resume(kept)
    while progress.step < steps:
        common, draw = draws(seed, progress.step)
        chunks = horizon(progress.step / steps, common)
        batch = draw_batch(strips, max(1, CHUNKS // chunks), chunks, draw)
        alone = common.random() < ALONE
        truth = corrupt(batch.latents, None, draw)
        latents = truth
        if alone:
            given = int(draw.integers(1, max(2, chunks // 2 + 1))) if draw.random() < GIVEN else 0
            seeds = draw.integers(2**62, size=len(batch.latents)).tolist()
            with torch.inference_mode():
                latents = roll_out(progress.world, config, ops, batch, given, seeds)
            latents = latents.clone()  # no longer an inference tensor
        for _ in range(TURNS):
            lr, graded = schedule(progress.step, steps, peak, 40), int(common.integers(len(work.levels)))
            made = work.step(batch, latents, lr, graded, draw, anchored=not alone)
            if not alone:
                latents = corrupt(truth, made.redrawn, draw)
            means |= {name: 0.95 * means.get(name, new) + 0.05 * new for name, new in made.measures.items()}
            if rank() == 0 and progress.step % 10 == 0:
                report("distil", {"step": progress.step, "of": steps, **means})
        if rank() == 0 and (progress.step >= steps or progress.step % (10 * TURNS) == 0):
            progress.save(out)
            work.critic.save(kept)
