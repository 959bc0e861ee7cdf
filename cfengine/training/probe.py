"""How well a state draws: first chunks by many stochastic passes, measured with the renderer's own geometry.

A teacher of flow matching draws better in more passes than an engine streams with. In a first chunk everything is new;
how many of its landmarks have a shape, and which, tells what a student can learn. Where a camera goes on, little is
new; whether a state reads there what noise says (see `cfengine.training.coupling`) is asked of its denoised truth.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfengine.codec.tiny_world import TinyWorldCodec
from cfengine.config import EngineConfig
from cfengine.model.text_tiny import CONCEPTS
from cfengine.training import measure, world
from cfengine.training.coupling import COLOURS, COUPLED, beginnings, couple
from cfengine.training.data import Batch, Strips
from cfengine.training.diffusion import levels_of, sampler_sigmas, spread
from cfengine.training.distil import context_of, guess, walk
from cfengine.training.seen import seen_columns, shown_in
from cfengine.training.state import World


class Drawn(NamedTuple):
    """landmarks: found a view      whole: share of them that fit their shape      shapes: share of each in those."""

    landmarks: float
    whole: float
    shapes: dict[str, float]


def probe(of: World, config: EngineConfig, strips: Strips, codec: TinyWorldCodec, scenes: int, passes: int) -> Drawn:
    """Draw the first chunks of `scenes` prompts in `passes` passes with new noise between them."""
    draw = np.random.default_rng(7)
    batch = strips.draw(scenes, 1, draw)
    torch.manual_seed(0)
    levels = levels_of([1000 * (passes - i) / passes for i in range(passes)], config.sampler.shift).tolist()
    context = context_of(of, config, batch.latents, batch.prompts)
    _, latents = walk(of, context, torch.randn(1, *batch.latents.shape), levels)
    found: list[measure.Seen] = []
    for chunk, words in zip(latents[0, :, 0], batch.prompts[:, 0, 1:].tolist(), strict=True):
        light, land, weather = (CONCEPTS[word] for word in words)
        frame = codec.decoder().decode(chunk)[-1]
        found += measure.landmarks_in(frame, world.Look(light=light, land=land, weather=weather))
    whole = Counter(mark.shape for mark in found if mark.whole)
    shares = {shape: whole[shape] / max(1, whole.total()) for shape in world.SHAPES}
    return Drawn(len(found) / scenes, whole.total() / max(1, len(found)), shares)


class Reading(NamedTuple):
    """Mean squared error of denoised latents where landmarks enter, in noise that says which, and in other noise."""

    said: float
    unsaid: float


def entering_landmarks(batch: Batch, new: Tensor) -> Tensor:
    """(B, C, c, VIEW) bool: columns of landmarks that begin among those that are `new` (as bool) in a chunk."""
    column, left = seen_columns(batch.yaws).column, batch.yaws[..., -1] < batch.yaws[..., -2]
    kind = torch.where(left[..., None], *(side[:, None] for side in beginnings(batch.landmarks).unbind(1)[::-1]))
    fresh = torch.zeros(kind.shape).scatter_reduce(-1, column.flatten(2), new.flatten(2).float(), "amax") > 0
    begins = fresh & (kind > 0)
    wide = begins & ((kind - 1) // COLOURS != world.SHAPES.index("tower"))  # of four columns, not two
    covered = begins.clone()
    for step, which in ((1, begins), (2, wide), (3, wide)):
        covered |= torch.where(left[..., None], which.roll(-step, -1), which.roll(step, -1))
    return covered.gather(-1, column.flatten(2)).view(new.shape) & new


@torch.no_grad()
def reading(of: World, config: EngineConfig, strips: Strips, sessions: int = 24, chunks: int = 8) -> Reading:
    """Denoise the truth of sessions of `chunks` chunks once, from the sampler's last level at which noise is coupled.

    The scenes are those of the training, as in `probe`; strips must know their landmarks.
    """
    batch = strips.draw(sessions, chunks, np.random.default_rng(8))
    torch.manual_seed(0)
    levels = sampler_sigmas(config.sampler)
    level = torch.full((1, sessions, chunks), levels[levels >= COUPLED].min().item())
    context = context_of(of, config, batch.latents, batch.prompts)
    shown = shown_in(context, batch.yaws)
    where = entering_landmarks(batch, (shown == 0) & (seen_columns(batch.yaws).entering > 0))
    noise, errors = torch.randn(1, *batch.latents.shape), []
    for kind in (couple(noise, level, batch, shown), noise):
        noisy = (1 - spread(level)) * batch.latents + spread(level) * kind
        wrong = (noisy - spread(level) * guess(of, context, noisy, level) - batch.latents)[0].square().mean((3, 4))
        errors.append((wrong * where).sum().item() / max(1, where.sum().item()))
    return Reading(*errors)
