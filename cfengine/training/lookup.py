"""Teaching the teacher to look things up: attention that finds where a place was seen before.

Copying what the chunk before shows, shifted as the prompt says, explains nearly everything in a video of this world;
the few columns that come back after they were out of view are the only ones that need the memory, and diffusion alone
did not learn to find them in 3,000 steps. So the renderer's geometry says which page tokens show the place of a token,
and some heads are held to them: the loss of a head is -log(its attention on those page tokens). Many sessions go
`back_and_forth`, so that much of what enters the view was seen. Not all of them, nor all the time: a teacher that
hardly meets what is new, or never right after what returns, draws a new landmark like one that it knows. And attention,
which adds up to one, always finds something: where no page shows a place, those heads are held to their own chunk.

All else is flow matching as before, with the columns that enter counting more. Where noise says what is new (see
`cfengine.training.coupling`), those that are new count most: they are few, and flow matching alone learned to read
little noise but that of first chunks, where everything is new. A part of the batches are first chunks still.

Sessions of training end when slow memory is just full. In one that goes on the sink comes from a place as far away as
any, which some sessions show by a jump after their first chunk (`jumps`).
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
from cfengine.training.coupling import COUPLED, NEW, couple
from cfengine.training.data import Batch, Source
from cfengine.training.diffusion import COPIES, draw_sigmas, made_of, sampler_sigmas, spread
from cfengine.training.forward import Pages, flow_from, remember
from cfengine.training.parallel import draws, rank
from cfengine.training.place import device_of, mixed
from cfengine.training.recycle import corrupt
from cfengine.training.seen import seen_columns, shown_in
from cfengine.training.settings import Descent
from cfengine.training.state import Progress, World

BLOCKS, HEADS = (2, 3, 4), 3  # where attention is taught: the first heads of these blocks
HIGH = (1.0, 1.0, 0.94, 0.85)  # noise levels of one of the copies: noise says what is new, and little is settled
WARM = 60  # steps until the learning rate is full
STEADY = 0.65  # share of the steps at the full learning rate; it then falls to zero
EARLY_LENGTHS = {(1, 16): 0.4, (16, 1): 0.6}  # chunks of a session, sessions in a batch of one process: share
LATE_LENGTHS = {(1, 16): 0.4, (4, 4): 0.05, (8, 2): 0.1, (16, 1): 0.2, (28, 1): 0.25}  # from STEADY on
JUMPS, FAR = (0.0, 0.6), 16  # share of sessions of FAR chunks and more that jump: while steady, then
SHUTTLES = 0.6  # share of sessions that go back and forth
WEIGHTS = (1.0, 0.4)  # of the loss of attention: while steady, then
MORE = (3.0, 2.0)  # how much more a column that enters counts in the flow's loss: while steady, then
USES = (1, 2)  # of a batch; from the second on, its context holds what the model made (error recycling)


class Lookup(NamedTuple):
    """What attention is taught.

    columns: (B, C, c, VIEW) column of the world that each token column shows      rows: of tokens in a frame
    returning: as columns, 1 where the column was seen before, but not in the chunk before
    """

    columns: Tensor
    returning: Tensor
    rows: int

    def loss(self, weight: Tensor, pages: Pages) -> Tensor:
        """-log(attention on the page tokens that show the same place, or on no page where none does), mean over tokens
        that return, or that no page shows.

        weight: (B C, heads, K, T, L), attention of noisy chunks on page tokens
        """
        count, c, width = pages.ids.shape[0] * pages.ids.shape[1], self.columns.shape[2], self.columns.shape[3]
        own = self.columns.flatten(0, 1)[:, :, None].expand(-1, -1, self.rows, -1).flatten(1)  # (B C, T)
        shown = self.columns.reshape(-1, width)[pages.ids.flatten(0, 1)]  # (B C, slots, VIEW)
        shown = shown[:, :, None].expand(-1, -1, self.rows, -1).flatten(1)  # (B C, L)
        row = torch.arange(self.rows, device=weight.device)[:, None].expand(-1, width).flatten()
        there = ~pages.hidden.reshape(count, 1, -1)
        same = there & (own[..., None] == shown[:, None])
        found = same.any(-1)  # (B C, T)
        same &= row.repeat(c)[:, None] == row.repeat(pages.ids.shape[2])
        taught = self.returning.flatten(0, 1)[:, :, None].expand(-1, -1, self.rows, -1).flatten(1).bool()
        taught = torch.where(found, taught, there.any(-1))[:, None, None]
        found = found[:, None, None]
        right = torch.where(found, (weight * same[:, None, None]).sum(-1), 1 - weight.sum(-1))  # (B C, heads, K, T)
        loss = -(right.clamp(min=0) + 1e-4).log() * taught
        return loss.sum() / taught.expand_as(right).sum().clamp(min=1)


class Teaching:
    """Collects the loss of attention of the blocks that are taught, as `flow_from` calls it block by block."""

    def __init__(self, lookup: Lookup) -> None:
        self.lookup, self.loss = lookup, torch.zeros(())

    def __call__(self, block: int, weight: Tensor, pages: Pages) -> None:
        """weight: (B C, heads, K, T, L)"""
        if block in BLOCKS:
            self.loss = self.loss + self.lookup.loss(weight[:, :HEADS], pages)


def lookup_step(
    world: World, config: EngineConfig, batch: Batch, context: Tensor, draw: np.random.Generator, late: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of one step (flow, attention), and x0 (B, C, ...) as `training_step`; late: 0 while steady, then 1."""
    B, C = batch.latents.shape[:2]
    device = batch.latents.device
    sigma = draw_sigmas((COPIES, B, C), sampler_sigmas(), draw)
    sigma[0] = torch.from_numpy(draw.choice(HIGH, size=(B, C))).float()
    sigma = sigma.to(device)
    noise = torch.randn(COPIES, *batch.latents.shape, device=device)
    columns, entering, returning = seen_columns(batch.yaws)
    teaching = Teaching(Lookup(columns, returning, config.grid[0]))
    with mixed(device):
        seen = remember(world.dit, config.memory, context, world.text(batch.prompts))
        shown = shown_in(seen, batch.yaws)
        noise = couple(noise, sigma, batch, shown)
        noisy = (1 - spread(sigma)) * batch.latents + spread(sigma) * noise
        guess = flow_from(world.dit, seen, noisy, 1000 * sigma, teaching)
    weight = 1 + MORE[late] * entering
    if batch.landmarks is not None:
        weight = weight + NEW * (sigma >= COUPLED)[..., None, None] * entering * (1 - shown)
    error = ((guess - (noise - batch.latents)).square() * weight[..., None, None, :]).mean()
    return {"flow": error, "attention": teaching.loss}, made_of(batch.latents, context, noisy, guess, sigma)


def train_lookup(
    out: Path,
    teacher: World,
    config: EngineConfig,
    source: Source,
    seed: int,
    steps: int,
    report: Callable[[str, dict], None],
    *,
    peak: float = 1e-3,
) -> None:
    """Go on with a copy of `teacher` for `steps` steps, from `out` where it exists, and leave the state there."""
    progress = Progress(copy.deepcopy(teacher).requires_grad_(True), Descent(steps, peak, warm=WARM, decay=0.99))
    progress.resume(out)
    device = device_of(teacher)
    means: dict[str, float] = {}
    while progress.step < steps:
        late = int(progress.step >= STEADY * steps)
        common, draw = draws(seed, progress.step)
        lengths = LATE_LENGTHS if late else EARLY_LENGTHS
        chunks, size = list(lengths)[common.choice(len(lengths), p=list(lengths.values()))]
        jumps = JUMPS[late] if chunks >= FAR else 0.0
        batch = source.draw(size, chunks, draw, shuttles=SHUTTLES, jumps=jumps).on(device)
        made = None
        for _ in range(USES[late]):
            context = corrupt(batch.latents, made, draw)
            losses, made = lookup_step(progress.world, config, batch, context, draw, late)
            (losses["flow"] + WEIGHTS[late] * losses["attention"]).backward()
            left = (steps - progress.step) / max(1.0, (1 - STEADY) * steps)
            progress.advance(peak * min(1.0, (progress.step + 1) / WARM, left))
            if chunks == 1:
                del losses["attention"]  # nothing to look up
            means |= {name: 0.98 * means.get(name, new.item()) + 0.02 * new.item() for name, new in losses.items()}
            if rank() == 0 and progress.step % 20 == 0:
                report("lookup", {"step": progress.step, "of": steps, **means})
            if rank() == 0 and progress.step % 120 == 0:
                progress.save(out)
    if rank() == 0:
        progress.save(out)
