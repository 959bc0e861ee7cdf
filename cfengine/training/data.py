"""Training data: whole turns of many scenes as latents, and camera scripts that walk over them.

The encoder works patch by patch and yaws move by 8/3 pixels a unit, so three strips of 60 latent columns (one per
phase of 8/3 pixels) hold every view of a scene: a session of any length is a gather.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cfengine.codec.tiny_world import SPACE, TinyWorldCodec
from cfengine.model.text_tiny import CONCEPTS, concepts_of
from cfengine.training import world

PHASES = 3
COLUMNS = world.TURN // SPACE
VIEW = world.WIDTH // SPACE
LOOKS = 2  # every scene is drawn in two looks, so that a prompt can change the look of the same place


class Strips(NamedTuple):
    """latents: (scenes, LOOKS, PHASES, COLUMNS, rows, channels) float16    words: (scenes, LOOKS, 3) concept numbers"""

    latents: torch.Tensor
    words: torch.Tensor


class Batch(NamedTuple):
    """latents: (B, C, 3, 16, rows, columns) float32, true views      concepts: (B, C, 5) concept number per group"""

    latents: torch.Tensor
    concepts: torch.Tensor


def strips_of(codec: TinyWorldCodec, scene: world.Scene) -> torch.Tensor:
    """Encode a whole turn of a scene -> (PHASES, COLUMNS, rows, channels) float16."""
    x = np.arange(world.TURN) + 0.5
    turns = [np.rint(world.render_columns(scene, x + SPACE / PHASES * phase)).clip(0, 255) for phase in range(PHASES)]
    images = torch.from_numpy(np.stack(turns)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        return codec.encoder_net(images).permute(0, 3, 2, 1).half()


def build_strips(codec: TinyWorldCodec | None, scenes: int, seed: int, path: Path | None = None) -> Strips:
    """Draw and encode `scenes` places in two looks each; kept at `path`, where no codec is needed the next time."""
    if path is not None and path.exists():
        kept = load_file(path)
        if len(kept["latents"]) == scenes:
            return Strips(kept["latents"], kept["words"])
    rng = np.random.default_rng(seed)
    latents = torch.empty(
        scenes, LOOKS, PHASES, COLUMNS, world.HEIGHT // SPACE, codec.latent_channels, dtype=torch.float16
    )
    words = torch.empty(scenes, LOOKS, 3, dtype=torch.long)
    for i in range(scenes):
        scene = world.random_scene(rng)
        for j in range(LOOKS):
            look = scene.look if j == 0 else world.random_look(rng)
            latents[i, j] = strips_of(codec, world.Scene(look, scene.landmarks, scene.hills))
            words[i, j] = torch.tensor([CONCEPTS.index(word) for word in (look.light, look.land, look.weather)])
    if path is not None:
        save_file({"latents": latents, "words": words}, path)
    return Strips(latents, words)


def camera_script(chunks: int, draw: np.random.Generator) -> np.ndarray:
    """Rates in pixels a chunk for every chunk: stretches of 2 to 10 chunks, often turning back at the end of one."""
    rates: list[int] = []
    rate = int(draw.choice([0, 16, -16, 8, -8], p=[0.14, 0.27, 0.27, 0.16, 0.16]))
    steady = draw.random() < 0.35
    while len(rates) < chunks:
        rates += [rate] * (chunks if steady else int(draw.integers(2, 11)))
        if rate and draw.random() < 0.4:
            rate = -rate
        else:
            rate = int(draw.choice([0, 16, -16, 8, -8], p=[0.2, 0.26, 0.26, 0.14, 0.14]))
    return np.asarray(rates[:chunks])


def view(strip: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Strips (n, PHASES, COLUMNS, rows, channels) seen at yaws (n, f) of 8/3 pixels -> (n, f, channels, rows, VIEW)."""
    n, frames = units.shape
    columns = (units.div(PHASES, rounding_mode="floor")[..., None] + torch.arange(VIEW)) % COLUMNS
    cut = strip[torch.arange(n)[:, None, None], (units % PHASES)[..., None], columns]
    return cut.permute(0, 1, 4, 3, 2).float()


def latent_yaws(rates: np.ndarray, start: int) -> np.ndarray:
    """Yaw in units of 8/3 pixels of every latent frame of sessions; rates (B, C) pixels a chunk -> (B, 3 C)."""
    steps = np.repeat(rates // SPACE, 3, axis=1)
    steps[:, 0] = 0
    return start + np.cumsum(steps, axis=1)


def rate_concepts(rate: int) -> tuple[int, int]:
    """Concept numbers of the camera and the speed group."""
    words = concepts_of(world.prompt_for(rate, world.Look()))
    return CONCEPTS.index(words[0]), CONCEPTS.index(words[1])


def draw_batch(strips: Strips, size: int, chunks: int, draw: np.random.Generator) -> Batch:
    """Sessions of `chunks` chunks in random scenes; in one of eight the prompt changes the look on the way."""
    scenes = torch.from_numpy(draw.integers(len(strips.latents), size=size))
    rates = np.stack([camera_script(chunks, draw) for _ in range(size)])
    units = torch.from_numpy(latent_yaws(rates, 0) + draw.integers(PHASES * COLUMNS, size=(size, 1)))
    change = np.where(draw.random(size) < 0.125, draw.integers(1, max(2, chunks), size=size), chunks)
    look = torch.from_numpy((np.arange(chunks) >= change[:, None]).astype(np.int64))  # (B, C)
    both = torch.stack([view(strips.latents[scenes, j], units) for j in range(LOOKS)], dim=1).unflatten(2, (chunks, 3))
    latents = both[torch.arange(size)[:, None], look, torch.arange(chunks)]
    camera = torch.tensor([[rate_concepts(int(rate)) for rate in row] for row in rates])
    words = strips.words[scenes[:, None], look]
    return Batch(latents, torch.cat([camera, words], dim=-1))
