"""Few-step distillation by distribution matching, first local, then under the student's own long context.

At a noise level of the sampler the flow-matching teacher predicts the mean of all clean chunks that fit: a blend of
every landmark that may appear. The student, a copy of the teacher at first, learns to answer with one of them. Its x0
after a random number of its own passes is noised again, and moved against the difference of two denoised versions:
that of a critic, which learns to denoise the student's samples, and that of the teacher (Yin et al., arXiv 2311.18828
and 2405.14867; with passes of the sampler and one that carries the gradient as in Huang et al., arXiv 2506.08009).
The teacher may be guided by what it makes without a prompt (Ho and Salimans, arXiv 2207.12598).
`cfengine.training.settings.Student` has the numbers.

Student, critic and teacher see the same context, unless `judges` gives the others a memory of their own, as a teacher
has that never saw a long past. In `alone` of the batches it is a rollout: what the student makes
chunk by chunk through the engine's own passes and memory. Stage 1 rolls out as far as the window of a short teacher
reaches; stage 2 (contextual distribution matching, Context Forcing, arXiv 2602.06028) draws the length from a range
that grows. `window` chunks at a random place of it are judged, or all of them. In the other batches the context is the
truth, or what the student's last pass makes of the noised truth, and that pass is also held to the truth, without which
colours pale. Where the renderer knows what the context shows already, every pass is held to that: what can be copied is
no matter of taste, and the judges' noise alone would blur it.

Where noise says what is new (see `cfengine.training.coupling`), passes of so much noise have nothing to choose: they
are held to what the teacher reads in the student's own noise and context, and near the truth to the truth. Judges are
asked about the passes that follow, and only where noise knows nothing; no guidance of theirs reaches the others.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.ops import Ops, select
from cfengine.scheduler.rollout import Rollout
from cfengine.training.coupling import COUPLED, NEW, couple
from cfengine.training.data import Batch, Source
from cfengine.training.diffusion import draw_sigmas, sampler_sigmas, spread
from cfengine.training.forward import Context, flow_from, remember, window
from cfengine.training.parallel import draws, rank
from cfengine.training.place import device_of, mixed, number
from cfengine.training.recycle import corrupt
from cfengine.training.seen import seen_columns, shown_in
from cfengine.training.settings import Student
from cfengine.training.state import Progress, World

COPIES = 2  # noise levels at which a sample is judged, and at which the critic learns from it
CRITIC_DECAY = 0.9  # of the critic's average, which nobody uses but a reader of its state
JUDGED = COUPLED - 0.01  # most noise of judges whose teacher reads in noise what is new
FLOOR = 0.1  # least size of the teacher's correction in the gradient's normalisation; latents have unit variance


def guess(world: World, context: Context, noisy: Tensor, sigma: Tensor, grad: bool = False) -> Tensor:
    """Flow of chunks (K, B, C, ...) at noise levels (K, B, C), in bfloat16.

    Each call has an autocast of its own: the weights it keeps from a call without gradient would pass none on.
    """
    with torch.set_grad_enabled(grad), mixed(noisy.device):
        return flow_from(world.dit, context, noisy, 1000 * sigma)


def context_of(world: World, config: EngineConfig, latents: Tensor, prompts: Tensor) -> Context:
    """What chunks see of `latents` (B, C, ...) through the eyes of `world`; carries no gradient."""
    with torch.no_grad(), mixed(latents.device):
        return remember(world.dit, config.memory, latents, world.text(prompts))


def walk(
    world: World, context: Context, x: Tensor, levels: list[float], graded: int | None = None
) -> tuple[Tensor | None, Tensor]:
    """Run the sampler's passes at `levels`, of which x (1, B, C, ...) is at the first, with new noise between them.

    -> x0 of pass `graded`, the only one with a gradient (None: no pass), and of the last, each as x
    """
    kept, x0 = None, x
    for i, level in enumerate(levels):
        flow = guess(world, context, x, torch.full(x.shape[:3], level, device=x.device), grad=i == graded)
        x0 = x - level * flow
        if i == graded:
            kept, x0 = x0, x0.detach()
        if i + 1 < len(levels):
            x = (1 - levels[i + 1]) * x0 + levels[i + 1] * torch.randn_like(x0)
    return kept, x0


def finer(level: float, fine: list[float]) -> list[float]:
    """`level` and those of a finer schedule that lie below it."""
    return [level, *(other for other in fine if other < level - 1e-4)]


@torch.no_grad()
def come_to(world: World, context: Context, noise: Tensor, levels: list[float], place: int) -> Tensor:
    """What pass number `place` is given, where the passes before it began with `noise` (1, B, C, ...)."""
    if not place:
        return noise
    _, x0 = walk(world, context, noise, levels[:place])
    return (1 - levels[place]) * x0 + levels[place] * torch.randn_like(x0)


def apart(x: Tensor, goal: Tensor, where: Tensor) -> Tensor:
    """Mean square of x - goal (..., c, channels, rows, columns) where `where` (..., c, columns) is 1; 0 for nowhere."""
    mask = where[..., None, None, :].expand_as(x)
    return ((x - goal).square() * mask).sum() / mask.sum().clamp(min=1)


def noised(x0: Tensor, draw: np.random.Generator, most: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x0 (1, B, C, ...) at COPIES random noise levels up to `most`, with noise that knows nothing of it.

    -> x_t (K, B, C, ...), sigma (K, B, C), noise (K, B, C, ...)
    """
    levels = sampler_sigmas()[1:]
    sigma = draw_sigmas((COPIES, *x0.shape[1:3]), levels[levels <= most], draw).clamp(max=most).to(x0.device)
    noise = torch.randn(COPIES, *x0.shape[1:], device=x0.device)
    return (1 - spread(sigma)) * x0 + spread(sigma) * noise, sigma, noise


class Judges(NamedTuple):
    """Who denoises a sample; each sees the context with its own eyes.

    blind: the teacher, without a prompt
    """

    critic: World
    teacher: World
    blind: World | None = None


@torch.no_grad()
def matching_gradient(
    judges: Judges,
    contexts: Judges,
    x0: Tensor,
    draw: np.random.Generator,
    guidance: float = 0.0,
    most: float = 1.0,
) -> Tensor:
    """Where the student's sample x0 (1, B, C, ...) is likelier than it should be: (denoised by the critic - by the
    guided teacher) / mean |x0 - denoised by the teacher| of a chunk, averaged over noise levels (DMD, equation 8).

    contexts: what each judge sees
    most: noise level at which they are asked
    """
    noisy, sigma, _ = noised(x0, draw, most)
    fake, real, blind = (
        None if judge is None else noisy - spread(sigma) * guess(judge, context, noisy, sigma)
        for judge, context in zip(judges, contexts, strict=True)
    )
    if blind is not None:
        real = real + guidance * (real - blind)
    size = (x0 - real).abs().mean(dim=(3, 4, 5, 6), keepdim=True).clamp(min=FLOOR)
    return ((fake - real) / size).mean(0, keepdim=True)


def critic_loss(critic: World, context: Context, x0: Tensor, draw: np.random.Generator, most: float = 1.0) -> Tensor:
    """Flow matching on the student's samples x0 (1, B, C, ...), at noise levels up to `most`."""
    noisy, sigma, noise = noised(x0, draw, most)
    return (guess(critic, context, noisy, sigma, grad=True) - (noise - x0)).square().mean()


class Made(NamedTuple):
    """What a step made: the student's samples (B, window, ...), what it was shown (B, C, ...) with the judged chunks of
    the truth as its last pass redraws them, means to report.
    """

    sample: Tensor
    redrawn: Tensor | None
    measures: dict[str, float]


class Distillation:
    """Student, critic and teacher, and one step of the first two."""

    def __init__(self, teacher: World, config: EngineConfig, settings: Student) -> None:
        self.config, self.settings = config, settings
        self.student = Progress(copy.deepcopy(teacher).requires_grad_(True), settings)
        pace = dataclasses.replace(settings, decay=CRITIC_DECAY)
        self.critic = Progress(copy.deepcopy(teacher).requires_grad_(True), pace)
        self.judges = Judges(self.critic.world, teacher, teacher if settings.guidance else None)
        self.levels = sampler_sigmas(config.sampler)
        judged = dataclasses.replace(config.memory, **settings.judges)
        self.theirs = dataclasses.replace(config, memory=judged)  # what the judges remember with

    def contexts(self, latents: Tensor, prompts: Tensor) -> tuple[Context, Judges]:
        """What the student and each judge see."""
        texts = Judges(prompts, prompts, torch.zeros_like(prompts))  # rows of zeros are what pads a prompt
        own = context_of(self.student.world, self.config, latents, prompts)
        return own, Judges(
            *(
                None if judge is None else context_of(judge, self.theirs, latents, text)
                for judge, text in zip(self.judges, texts, strict=True)
            )
        )

    def step(self, batch: Batch, latents: Tensor, graded: int, draw: np.random.Generator, *, anchored: bool) -> Made:
        """Update student and critic under the context `latents` (B, C, ...); `graded`: pass that learns."""
        settings, student, critic = self.settings, self.student.world, self.critic.world
        rate, first, count = self.student.rate, *self.judged(latents.shape[1], draw)
        own, seen = self.contexts(latents, batch.prompts)
        if count < latents.shape[1]:
            own = window(own, first, count)
            seen = Judges(*(None if context is None else window(context, first, count) for context in seen))
        part = batch.window(first, count)
        shown = shown_in(own, batch.yaws, first)
        most = 1.0 if batch.landmarks is None else JUDGED
        truth = part.latents
        levels = self.levels.tolist()
        x = come_to(student, own, torch.randn(1, *truth.shape, device=truth.device), levels, graded)
        x0, final = walk(student, own, x, levels[graded:], 0)
        read = levels[graded] > most  # so much noise says what is new
        if read:
            level = torch.full(x.shape[:3], levels[graded], device=x.device)
            goal = x - spread(level) * guess(self.judges.teacher, seen.teacher, x, level)
            fresh = seen_columns(batch.yaws).entering[:, first : first + count] * (1 - shown)
            drift = ((x0 - goal).square() * (1 + NEW * fresh)[..., None, None, :]).mean()
            (settings.anchor * drift).backward()
            measures = {"drift": number(drift)}
        else:
            gradient = matching_gradient(self.judges, seen, x0.detach(), draw, settings.guidance, most)
            (x0 * gradient).mean().backward()
            measures = {"gradient": number(gradient.abs().mean())}
        whole = None
        if anchored:
            last, held = redrawn(student, self.levels, own, part, shown, draw)
            anchor = (last - truth).square().mean()
            (settings.anchor * (anchor + held)).backward()
            whole, measures["anchor"] = latents.clone(), number(anchor)
            whole[:, first : first + count] = last.detach()
            if batch.yaws is not None:
                measures["held"] = number(held)
        self.student.advance()
        for _ in range(0 if read else settings.critic_steps):  # under the context as it was: no gradient goes there
            loss = critic_loss(critic, seen.critic, x0.detach(), draw, most)
            loss.backward()
            self.critic.advance(settings.critic_pace * rate)
            measures["critic"] = number(loss)
        return Made(final[0], whole, measures)

    def judged(self, chunks: int, draw: np.random.Generator) -> tuple[int, int]:
        """First and number of the chunks that are judged."""
        count = min(self.settings.window or chunks, chunks)
        return (int(draw.integers(chunks - count + 1)) if count < chunks else 0), count


def redrawn(
    student: World, levels: Tensor, own: Context, batch: Batch, shown: Tensor | None, draw: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """True chunks (B, C, ...) as the student's last pass redraws them, and how far off a pass before is where the
    context, or coupled noise, shows what to draw; both carry the gradient.

    levels: of the student's passes      shown: as `shown_columns`; None: nobody knows
    """
    truth = batch.latents
    sigma = levels[-1].expand(1, *truth.shape[:2])
    if shown is not None:
        earlier = levels[torch.from_numpy(draw.integers(len(levels) - 1, size=truth.shape[:2]))]
        sigma = torch.cat([sigma, earlier[None]])
    sigma = sigma.to(truth.device)
    noise = couple(torch.randn(len(sigma), *truth.shape, device=truth.device), sigma, batch, shown)
    noisy = (1 - spread(sigma)) * truth + spread(sigma) * noise
    x0 = noisy - spread(sigma) * guess(student, own, noisy, sigma, grad=True)
    if shown is None:
        return x0[0], truth.new_zeros(())
    if batch.landmarks is not None:
        shown = torch.where((sigma[1] >= COUPLED)[..., None, None], 1.0, shown)
    return x0[0], apart(x0[1], truth, shown)


def horizon(settings: Student, share: float, common: np.random.Generator) -> int:
    """Chunks of a session when `share` of the steps are done: the same in all processes."""
    if common.random() < settings.first:
        return 1
    if share < settings.local:
        return int(common.integers(settings.short[0], settings.short[1] + 1))
    least, first, last = settings.long
    most = first + (last - first) * (share - settings.local) / (1 - settings.local)
    return int(common.integers(least, round(most) + 1))


def roll_out(student: World, config: EngineConfig, ops: Ops, batch: Batch, given: int, seeds: list[int]) -> Tensor:
    """Latents (B, C, ...) of sessions with a batch's prompts: `given` true chunks, then what the student makes of them.

    Chunk by chunk, as the engine streams: passes of the sampler, the clean pass, the memory's own rule.
    """
    model = copy.deepcopy(student.dit).prepare()
    sessions, chunks = batch.latents.shape[:2]
    text, worded = student.text(batch.prompts), not batch.prompts.is_floating_point()
    # what tells two prompts apart: their concepts; a clip has one prompt
    keys = [[tuple(batch.prompts[b, c].tolist()) if worded else b for b in range(sessions)] for c in range(chunks)]
    rows = {keys[c][b]: text[b, c] for c in range(chunks) for b in range(sessions)}
    rollout = Rollout(model, config, ops, lambda key: model.project_text(rows[key]), seeds)
    parts = []
    for chunk in range(chunks):
        if chunk < given:
            rollout.prime(batch.latents[:, chunk], keys[chunk])
        else:
            rollout.step(keys[chunk])
        parts.append(rollout.latents)
    return torch.stack(parts, 1)


def own_past(
    student: World, config: EngineConfig, ops: Ops, batch: Batch, share: float, draw: np.random.Generator
) -> Tensor:
    """A rollout (B, C, ...); with a probability of `share` it goes on from true chunks, up to half of them."""
    chunks = batch.latents.shape[1]
    given = int(draw.integers(1, max(2, chunks // 2 + 1))) if draw.random() < share else 0
    seeds = draw.integers(2**62, size=len(batch.latents)).tolist()
    with torch.inference_mode():
        latents = roll_out(student, config, ops, batch, given, seeds)
    return latents.clone()  # no longer an inference tensor


def train_distil(
    out: Path,
    teacher: World,
    config: EngineConfig,
    source: Source,
    seed: int,
    settings: Student,
    report: Callable[[str, dict], None],
) -> None:
    """Distil `teacher` in `settings.steps` steps, in whole batches.

    Goes on from `out` where it exists; the state stays there.
    """
    work, steps, device = Distillation(teacher, config, settings), settings.steps, device_of(teacher)
    kept = out.with_name(f"{out.stem}-critic{out.suffix}")
    progress, means, ops = work.student, {}, select(device.type)
    if progress.resume(out):
        work.critic.resume(kept)
    while progress.step < steps:
        common, draw = draws(seed, progress.step)
        chunks = horizon(settings, progress.step / steps, common)
        batch = source.draw(settings.sessions(chunks), chunks, draw, shuttles=settings.shuttles).on(device)
        alone = common.random() < settings.alone
        truth = corrupt(batch.latents, None, draw)
        latents = own_past(progress.world, config, ops, batch, settings.given, draw) if alone else truth
        for _ in range(settings.turns):
            graded = int(common.integers(len(work.levels)))
            made = work.step(batch, latents, graded, draw, anchored=not alone)
            if not alone:
                latents = corrupt(truth, made.redrawn, draw)
            means |= {name: 0.95 * means.get(name, new) + 0.05 * new for name, new in made.measures.items()}
            if rank() == 0 and progress.step % 10 == 0:
                report("distil", {"step": progress.step, "of": steps, **means})
        if rank() == 0 and (progress.step >= steps or progress.step % (10 * settings.turns) == 0):
            progress.save(out)
            work.critic.save(kept)
