"""How well a state draws: first chunks by many stochastic passes, measured with the renderer's own geometry.

A teacher of flow matching draws better in more passes than an engine streams with. In a first chunk everything is new;
how many of its landmarks have a shape, and which, tells what a student can learn.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from cfengine.codec.tiny_world import TinyWorldCodec
from cfengine.config import EngineConfig
from cfengine.model.text_tiny import CONCEPTS
from cfengine.training import measure, world
from cfengine.training.data import Strips
from cfengine.training.diffusion import levels_of
from cfengine.training.distil import context_of, walk
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
