"""The small world: a procedural panorama on a cylinder, seen by a camera that turns at the rate its prompt names.

One pixel of the image is one pixel of the cylinder (0.75 degrees, 480 pixels a turn), so a turning camera shifts the
image without distortion: yaw grows to the right, the image then moves left. Shapes are evaluated at pixel centres
with soft edges one pixel wide, so motion below a pixel is exact and there is no aliasing.

The camera stands still or pans by 24 pixels a chunk of 12 frames. With the codec's strides of 8 pixels and 4 frames
that is one latent column a latent frame; sessions start and landmarks stand on edges of latent columns, so a pan is an
exact shift of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT, FPS = 96, 64, 16
TURN = 480  # pixels in a full turn
COLUMN = 8  # pixels of a latent column
GAP = 5  # latent columns between the middles of neighbouring landmarks, at least
DEGREES_PER_PIXEL = 360.0 / TURN
CHUNK_VIDEO_FRAMES, FIRST_CHUNK_VIDEO_FRAMES = 12, 9
HORIZON, BASE = 38.0, 48.0  # image rows: where the ground starts, where landmarks stand

RATES = {"hold": 0, "right": 24, "left": -24}  # pixels a chunk of 12 frames
LIGHTS = ("day", "sunset", "night")
LANDS = ("meadow", "desert", "snow")
WEATHERS = ("clear", "overcast", "fog")
SHAPES = ("tower", "cone", "ball", "arch")
COLOURS = {
    "red": (228, 26, 36),
    "yellow": (252, 226, 16),
    "blue": (24, 50, 236),
    "magenta": (226, 28, 206),
    "cyan": (0, 226, 220),
}

_SKY = {  # colour at the top of the image, colour at the horizon
    "day": ((104, 158, 222), (190, 214, 236)),
    "sunset": ((112, 84, 132), (246, 176, 124)),
    "night": ((12, 14, 34), (44, 48, 82)),
}
_GROUND = {  # colour at the horizon, colour at the bottom of the image
    "meadow": ((126, 150, 96), (74, 106, 58)),
    "desert": ((214, 186, 138), (178, 142, 96)),
    "snow": ((230, 234, 240), (196, 204, 216)),
}
_TINT = {"day": (1.0, 1.0, 1.0), "sunset": (0.92, 0.74, 0.68), "night": (0.30, 0.32, 0.44)}
_FOG = {"day": (206, 208, 212), "sunset": (206, 178, 164), "night": (84, 88, 104)}
_OVERCAST = {"day": (158, 164, 172), "sunset": (158, 138, 136), "night": (40, 42, 50)}
_FOG_SHARE, _OVERCAST_SHARE = 0.4, 0.75


@dataclass(frozen=True)
class Look:
    """What the prompt says about colours."""

    light: str = "day"
    land: str = "meadow"
    weather: str = "clear"


@dataclass(frozen=True)
class Landmark:
    """A coloured shape standing at `bearing` degrees, clockwise from yaw 0."""

    bearing: float
    shape: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """Everything there is to see: the look, the landmarks, the hills as (cycles a turn, height in pixels, phase)."""

    look: Look
    landmarks: tuple[Landmark, ...]
    hills: tuple[tuple[int, float, float], ...]


def random_look(rng: np.random.Generator) -> Look:
    """Draw each word of a look uniformly."""
    return Look(str(rng.choice(LIGHTS)), str(rng.choice(LANDS)), str(rng.choice(WEATHERS)))


def random_scene(rng: np.random.Generator, look: Look | None = None) -> Scene:
    """Draw seven or eight landmarks on edges of latent columns, at least 40 pixels apart, and three waves of hills."""
    count = int(rng.integers(7, 9))
    spacing = TURN / COLUMN / count
    middles = (np.arange(count) + rng.random()) * spacing + (rng.random(count) - 0.5) * (spacing - GAP)
    centres = COLUMN * np.floor(middles)
    landmarks = tuple(
        Landmark(float(c % TURN) * DEGREES_PER_PIXEL, str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))))
        for c in centres
    )
    hills = tuple(
        (int(rng.integers(low, high)), float(rng.uniform(0.8, 1.8)), float(rng.uniform(0, 2 * np.pi)))
        for low, high in ((3, 6), (6, 9), (9, 13))
    )
    return Scene(look or random_look(rng), landmarks, hills)


def random_yaw(rng: np.random.Generator) -> int:
    """Draw where a camera may start, in pixels: on an edge of a latent column."""
    return COLUMN * int(rng.integers(TURN // COLUMN))


def camera_yaws(rates: list[int] | np.ndarray, yaw: float = 0.0) -> np.ndarray:
    """Yaw in pixels of every video frame of a session whose chunk i turns at `rates[i]` pixels a 12 frames.

    The first chunk has 9 frames, the first of them at `yaw`; each later frame adds its own chunk's rate / 12.
    """
    frames = [FIRST_CHUNK_VIDEO_FRAMES] + [CHUNK_VIDEO_FRAMES] * (len(rates) - 1)
    steps = np.repeat(np.asarray(rates, dtype=np.float64) / CHUNK_VIDEO_FRAMES, frames)
    steps[0] = 0.0
    return yaw + np.cumsum(steps)


def prompt_for(rate: int, look: Look) -> str:
    """The canonical prompt for a camera rate and a look."""
    camera = {value: name for name, value in RATES.items()}[rate]
    return f"{f'pan {camera}' if rate else camera}, {look.land}, {look.light}, {look.weather}"


def coverage(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Share of each pixel that a shape covers; u: pixels right of its middle, v: pixels below its foot (above: < 0)."""
    side = np.abs(u)
    if shape == "tower":
        distance = np.maximum(side - 5.0, np.maximum(v, -v - 34.0))
    elif shape == "cone":
        distance = np.maximum((side - 14.0 * (1.0 + v / 30.0)) * 0.906, v)
    elif shape == "ball":
        distance = np.hypot(u, v + 12.0) - 12.0
    elif shape == "arch":
        hole = np.maximum(side - 6.5, -v - 15.0)
        distance = np.maximum(np.maximum(side - 14.0, np.maximum(v, -v - 24.0)), -hole)
    else:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def _fogged(colour: np.ndarray, look: Look) -> np.ndarray:
    share = _FOG_SHARE if look.weather == "fog" else 0.0
    return colour * (1.0 - share) + np.asarray(_FOG[look.light]) * share


def backdrop(look: Look) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sky (rows, 3), ground (rows, 3) and hill (3,) colours of a look as floats 0..255, each over all image rows."""
    row = np.arange(HEIGHT) + 0.5
    top, horizon = (np.asarray(c, dtype=np.float64) for c in _SKY[look.light])
    sky = top + np.clip(row / HORIZON, 0, 1)[:, None] * (horizon - top)
    if look.weather == "overcast":
        sky += _OVERCAST_SHARE * (np.asarray(_OVERCAST[look.light]) - sky)
    far, near = (np.asarray(c) * _TINT[look.light] for c in _GROUND[look.land])
    ground = far + np.clip((row - HORIZON) / (HEIGHT - HORIZON), 0, 1)[:, None] * (near - far)
    hill = 0.66 * far
    return _fogged(sky, look), _fogged(ground, look), _fogged(hill, look)


def landmark_colour(colour: str, look: Look) -> np.ndarray:
    """(3,) colour of a landmark as the camera sees it; light leaves it alone, fog pales it."""
    return _fogged(np.asarray(COLOURS[colour], dtype=np.float64), look)


def render_columns(scene: Scene, x: np.ndarray) -> np.ndarray:
    """Render image columns at cylinder positions x (n,) in pixels -> (HEIGHT, n, 3) float32, 0..255."""
    row = (np.arange(HEIGHT) + 0.5)[:, None]
    sky, ground, hill = backdrop(scene.look)
    crest = HORIZON - 4.5 - sum(a * np.sin(2 * np.pi * n * x / TURN + p) for n, a, p in scene.hills)
    image = np.where(row[..., None] < HORIZON, sky[:, None], ground[:, None])
    share = np.clip(row + 0.5 - crest, 0, 1) * np.clip(HORIZON - row + 0.5, 0, 1)
    image = image + share[..., None] * (hill - image)
    for landmark in scene.landmarks:
        u = (x - landmark.bearing / DEGREES_PER_PIXEL + TURN / 2) % TURN - TURN / 2
        near = np.abs(u) < 18
        if near.any():
            cover = coverage(landmark.shape, u[near][None], row - BASE)[..., None]
            image[:, near] += cover * (landmark_colour(landmark.colour, scene.look) - image[:, near])
    return image.astype(np.float32)


def render(scene: Scene, yaws: np.ndarray) -> np.ndarray:
    """Render one frame per yaw (pixels; the left edge of the image) -> (frames, HEIGHT, WIDTH, 3) uint8."""
    columns = np.asarray(yaws)[:, None] + np.arange(WIDTH) + 0.5
    image = render_columns(scene, columns.reshape(-1)).reshape(HEIGHT, len(columns), WIDTH, 3)
    return np.rint(image.transpose(1, 0, 2, 3)).clip(0, 255).astype(np.uint8)
