"""Training data: whole turns of many scenes as latents, and camera scripts that walk over them.

The encoder works patch by patch and cameras move by whole latent columns a latent frame, so a strip of 60 latent
columns holds every view of a scene: a session of any length is a gather.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cfengine.codec.tiny_world import SPACE, TinyWorldCodec
from cfengine.model.text_tiny import CONCEPTS, concepts_of
from cfengine.training import world

CHUNK_FRAMES = 3  # latent frames of a chunk
COLUMNS = world.TURN // SPACE
VIEW = world.WIDTH // SPACE
CHOICES, SHARES = list(world.RATES.values()), (0.2, 0.4, 0.4)  # cameras of a script and how often each is drawn
LOOKS = 2  # every scene is drawn in two looks, so that a prompt can change the look of the same place


class Strips(NamedTuple):
    """latents: (scenes, LOOKS, COLUMNS, rows, channels) float16    words: (scenes, LOOKS, 3) concept numbers

    landmarks: (scenes, 8, 3), see `landmarks_of`; None: nobody shall know
    """

    latents: torch.Tensor
    words: torch.Tensor
    landmarks: torch.Tensor | None = None

    def draw(
        self, size: int, chunks: int, draw: np.random.Generator, *, shuttles: float = 0.0, jumps: float = 0.0
    ) -> Batch:
        """See `draw_batch`."""
        return draw_batch(self, size, chunks, draw, shuttles=shuttles, jumps=jumps)


class Batch(NamedTuple):
    """latents: (B, C, 3, 16, rows, columns) float32, the truth

    prompts: (B, C, 4) concept number per group, or (B, C, n, text_dim) rows of a text encoder
    yaws: (B, C, 3) of the views, in latent columns; None where no renderer made them
    landmarks: (B, 8, 3) of the scenes, as in `Strips`
    """

    latents: torch.Tensor
    prompts: torch.Tensor
    yaws: torch.Tensor | None
    landmarks: torch.Tensor | None = None

    def on(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(part if part is None else part.to(device) for part in self))

    def window(self, first: int, count: int) -> Batch:
        """`count` chunks from `first` on."""
        chunks = slice(first, first + count)
        yaws = None if self.yaws is None else self.yaws[:, chunks]
        return self._replace(latents=self.latents[:, chunks], prompts=self.prompts[:, chunks], yaws=yaws)


class Source(Protocol):
    """What batches are drawn from."""

    def draw(
        self, size: int, chunks: int, draw: np.random.Generator, *, shuttles: float = 0.0, jumps: float = 0.0
    ) -> Batch:
        """`size` sessions of `chunks` chunks; shuttles, jumps: see `draw_batch`"""


def strips_of(codec: TinyWorldCodec, scene: world.Scene) -> torch.Tensor:
    """Encode a whole turn of a scene -> (COLUMNS, rows, channels) float16."""
    turn = np.rint(world.render_columns(scene, np.arange(world.TURN) + 0.5)).clip(0, 255)
    image = torch.from_numpy(turn).permute(2, 0, 1).float() / 127.5 - 1
    with torch.inference_mode():
        return codec.encoder_net(image[None])[0].permute(2, 1, 0).half()


def landmarks_of(scene: world.Scene) -> torch.Tensor:
    """(8, 3) the column right of a landmark's middle, its shape, its colour; -1 where there are only seven."""
    marks = torch.full((8, 3), -1)
    for i, mark in enumerate(scene.landmarks):
        middle = round(mark.bearing / world.DEGREES_PER_PIXEL / world.COLUMN) % COLUMNS
        marks[i] = torch.tensor([middle, world.SHAPES.index(mark.shape), list(world.COLOURS).index(mark.colour)])
    return marks


def build_strips(codec: TinyWorldCodec | None, scenes: int, seed: int, path: Path | None = None) -> Strips:
    """Draw and encode `scenes` places in two looks each; kept at `path`, where no codec is needed the next time."""
    if path is not None and path.exists() and drawn_in(path) == scenes:
        return Strips(**load_file(path))
    rng = np.random.default_rng(seed)
    latents = torch.empty(scenes, LOOKS, COLUMNS, world.HEIGHT // SPACE, codec.latent_channels, dtype=torch.float16)
    words = torch.empty(scenes, LOOKS, 3, dtype=torch.long)
    landmarks = []
    for i in range(scenes):
        scene = world.random_scene(rng)
        landmarks.append(landmarks_of(scene))
        for j in range(LOOKS):
            look = scene.look if j == 0 else world.random_look(rng)
            latents[i, j] = strips_of(codec, world.Scene(look, scene.landmarks, scene.hills))
            words[i, j] = torch.tensor([CONCEPTS.index(word) for word in (look.light, look.land, look.weather)])
    strips = Strips(latents, words, torch.stack(landmarks))
    if path is not None:
        part = path.with_suffix(".part")
        save_file(strips._asdict(), part)
        os.replace(part, path)
    return strips


def drawn_in(path: Path) -> int:
    """Scenes of a file of strips; 0 for one that lacks something."""
    with safe_open(path, "pt") as file:
        return file.get_slice("latents").get_shape()[0] if set(file.keys()) == set(Strips._fields) else 0


def camera_script(chunks: int, draw: np.random.Generator) -> np.ndarray:
    """Rates in pixels a chunk for every chunk: stretches of 2 to 10 chunks, often turning back at the end of one."""
    rates: list[int] = []
    rate = int(draw.choice(CHOICES, p=SHARES))
    steady = draw.random() < 0.35
    while len(rates) < chunks:
        rates += [rate] * (chunks if steady else int(draw.integers(2, 11)))
        if rate and draw.random() < 0.4:
            rate = -rate
        else:
            rate = int(draw.choice(CHOICES, p=SHARES))
    return np.asarray(rates[:chunks])


def shuttle(chunks: int, draw: np.random.Generator) -> np.ndarray:
    """Rates as in `camera_script` of a camera that goes back and forth within 2 to 9 chunks of where it began."""
    width, side, at = int(draw.integers(2, 10)), int(draw.choice((-1, 1))), 0
    rates: list[int] = []
    while len(rates) < chunks:
        goal = int(draw.choice([place for place in range(width + 1) if place != at]))
        rates += [world.RATES["right"] * side * (1 if goal > at else -1)] * abs(goal - at)
        rates += [world.RATES["hold"]] * int(draw.choice((0, 0, 0, 1, 2)))
        at = goal
    return np.asarray(rates[:chunks])


def ratchet(chunks: int, draw: np.random.Generator) -> np.ndarray:
    """Rates of a camera that goes on by 4 to 7 chunks, back by 1 to 3 of them, and on again: what is new comes right
    after what returns.
    """
    rates: list[int] = []
    rate = world.RATES["right"] * int(draw.choice((-1, 1)))
    while len(rates) < chunks:
        on = int(draw.integers(4, 8))
        rates += [rate] * on + [world.RATES["hold"]] * int(draw.choice((0, 0, 1)))
        rates += [-rate] * int(draw.integers(1, 4))
    return np.asarray(rates[:chunks])


def back_and_forth(chunks: int, draw: np.random.Generator) -> np.ndarray:
    """A `shuttle` or a `ratchet`."""
    return (shuttle, ratchet)[int(draw.integers(2))](chunks, draw)


def view(strip: torch.Tensor, yaws: torch.Tensor) -> torch.Tensor:
    """Strips (n, COLUMNS, rows, channels) seen at yaws (n, f) in columns -> (n, f, channels, rows, VIEW) float32."""
    columns = (yaws[..., None] + torch.arange(VIEW)) % COLUMNS
    cut = strip[torch.arange(len(strip))[:, None, None], columns]
    return cut.permute(0, 1, 4, 3, 2).float()


def latent_yaws(rates: np.ndarray, start: int) -> np.ndarray:
    """Yaw in latent columns of every latent frame of sessions; rates (B, C) pixels a chunk -> (B, 3 C)."""
    steps = np.repeat(rates // (CHUNK_FRAMES * SPACE), CHUNK_FRAMES, axis=1)
    steps[:, 0] = 0
    return start + np.cumsum(steps, axis=1)


def camera_concept(rate: int) -> int:
    """Number of the concept that names a camera rate."""
    return CONCEPTS.index(concepts_of(world.prompt_for(rate, world.Look()))[0])


def draw_batch(
    strips: Strips,
    size: int,
    chunks: int,
    draw: np.random.Generator,
    *,
    shuttles: float = 0.0,
    jumps: float = 0.0,
) -> Batch:
    """Sessions of `chunks` chunks in random scenes; in one of eight the prompt changes the look on the way.

    shuttles: share of sessions whose camera goes `back_and_forth`, others have a `camera_script`
    jumps: share of sessions whose camera looks somewhere else after the first chunk, so that the sink is as far from
    the rest as it is in a session that has gone on for long
    """
    scenes = torch.from_numpy(draw.integers(len(strips.latents), size=size))
    scripts = [back_and_forth if shuttles and draw.random() < shuttles else camera_script for _ in range(size)]
    rates = np.stack([script(chunks, draw) for script in scripts])
    yaws = torch.from_numpy(latent_yaws(rates, 0) + draw.integers(COLUMNS, size=(size, 1)))
    if jumps:
        away = torch.from_numpy((draw.random((size, 1)) < jumps) * draw.integers(COLUMNS, size=(size, 1)))
        yaws[:, CHUNK_FRAMES:] += away
    change = np.where(draw.random(size) < 0.125, draw.integers(1, max(2, chunks), size=size), chunks)
    look = torch.from_numpy((np.arange(chunks) >= change[:, None]).astype(np.int64))  # (B, C)
    both = torch.stack([view(strips.latents[scenes, j], yaws) for j in range(LOOKS)], dim=1)
    both = both.unflatten(2, (chunks, CHUNK_FRAMES))
    latents = both[torch.arange(size)[:, None], look, torch.arange(chunks)]
    camera = torch.tensor([[[camera_concept(int(rate))] for rate in row] for row in rates])
    prompts = torch.cat([camera, strips.words[scenes[:, None], look]], dim=-1)
    landmarks = None if strips.landmarks is None else strips.landmarks[scenes]
    return Batch(latents, prompts, yaws.unflatten(1, (chunks, CHUNK_FRAMES)), landmarks)
