"""Self-distillation: the last passes learn what more passes of the same student make of the same noise.

Every further pass of a student may mend what those before it mixed up, such as a tower with the foot of a cone. So the
student is its own teacher, as in progressive distillation (Salimans and Ho, arXiv 2202.00512), here for a sampler that
noises again between passes: from a noisy chunk that the student has come to, a frozen copy of it goes down a finer
schedule, and where that ends is the target of the pass. From much noise more passes could go anywhere, and the mean of
all that is no landmark; so the first `held` passes, which choose what is drawn, only keep what they answer.

It buys form with variety, as every descent to the likeliest does: what was in doubt becomes what is drawn most often.
`blend` says how far the weights go (an interpolation as in Wortsman et al., arXiv 2109.01903).

Contexts and what holds the student to them are those of `cfengine.training.distil`; there are no judges here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.ops import select
from cfengine.training.data import Batch, Source
from cfengine.training.diffusion import levels_of, sampler_sigmas
from cfengine.training.distil import come_to, context_of, finer, guess, own_past, redrawn, walk
from cfengine.training.parallel import draws, rank
from cfengine.training.place import device_of, number
from cfengine.training.recycle import corrupt
from cfengine.training.seen import shown_in
from cfengine.training.settings import Polish, Student
from cfengine.training.state import Progress, World


class Polishing:
    """A student, the copy of it that is its teacher, and one step."""

    def __init__(self, student: World, config: EngineConfig, settings: Polish) -> None:
        self.config, self.settings = config, settings
        self.copy = copy.deepcopy(student).requires_grad_(False)
        self.student = Progress(copy.deepcopy(student).requires_grad_(True), settings)
        self.levels = sampler_sigmas(config.sampler)
        self.fine = levels_of(settings.passes, config.sampler.shift).tolist()

    def step(
        self, batch: Batch, latents: Tensor, place: int, draw: np.random.Generator, *, anchored: bool
    ) -> tuple[Tensor | None, dict[str, float]]:
        """Update the student's pass number `place` under the context `latents` (B, C, ...).

        Returns what it made of the noised truth (as `redrawn`), where it is held to it, and means to report.
        """
        student, truth = self.student.world, batch.latents
        own, theirs = (context_of(world, self.config, latents, batch.prompts) for world in (student, self.copy))
        levels = self.levels.tolist()
        level = levels[place]
        with torch.no_grad():
            x = come_to(student, own, torch.randn(1, *truth.shape, device=truth.device), levels, place)
            held = place < self.settings.held
            _, goal = walk(self.copy, theirs, x, [level] if held else finer(level, self.fine))
        x0 = x - level * guess(student, own, x, torch.full(x.shape[:3], level, device=x.device), grad=True)
        loss = (x0 - goal).square().mean()
        loss.backward()
        measures, last = {f"pass{place}": number(loss)}, None
        if anchored:
            made, wrong = redrawn(student, self.levels, own, batch, shown_in(own, batch.yaws), draw)
            anchor = (made - truth).square().mean()
            (anchor + wrong).backward()
            last, measures["anchor"], measures["held"] = made.detach(), number(anchor), number(wrong)
        self.student.advance()
        return last, measures


def chosen(draw: np.random.Generator, shares: Sequence[float]) -> int:
    """A place in `shares`, as often as it says."""
    return int(draw.choice(len(shares), p=np.asarray(shares) / sum(shares)))


def train_polish(
    out: Path,
    student: World,
    config: EngineConfig,
    source: Source,
    seed: int,
    settings: Polish,
    batches: Student,
    report: Callable[[str, dict], None],
) -> None:
    """Go on with a copy of `student` for `settings.steps` steps, in whole batches, from `out` where it exists.

    batches: how long sessions are, and how many make a batch
    """
    work, device = Polishing(student, config, settings), device_of(student)
    progress, means, ops = work.student, {}, select(device.type)
    progress.resume(out)
    while progress.step < settings.steps:
        common, draw = draws(seed, progress.step)
        kind = chosen(common, (settings.first, max(0.0, 1 - settings.first - settings.far), settings.far))
        least, most = ((1, 1), batches.short, (batches.long[0], batches.long[-1]))[kind]
        chunks = int(common.integers(least, most + 1))
        batch = source.draw(batches.sessions(chunks), chunks, draw, shuttles=batches.shuttles).on(device)
        alone = kind > 0 and common.random() < batches.alone
        truth = corrupt(batch.latents, None, draw)
        latents = own_past(progress.world, config, ops, batch, batches.given, draw) if alone else truth
        for _ in range(batches.turns):
            place = chosen(common, settings.shares)
            made, measures = work.step(batch, latents, place, draw, anchored=kind > 0 and not alone)
            if made is not None:
                latents = corrupt(truth, made, draw)
            means |= {name: 0.95 * means.get(name, new) + 0.05 * new for name, new in measures.items()}
            if rank() == 0 and progress.step % 10 == 0:
                report("polish", {"step": progress.step, "of": settings.steps, **means})
        if rank() == 0 and (progress.step >= settings.steps or progress.step % (10 * batches.turns) == 0):
            progress.save(out)
