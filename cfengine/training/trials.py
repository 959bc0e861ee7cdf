"""Tests of memory: a landmark that was seen leaves the view, and the camera comes back to it after a known time.

The past is rendered, so its landmarks are known. A trial pans by PRIMED chunks until its target stands near the middle
of the view; none of the first chunk's frames, which are the sink of every policy that has one, shows any of it. The
camera then goes on in the same direction until the target is out of view, follows a script, and pans back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cfengine.training import world

PRIMED = 6  # chunks of the rendered past
SPEED = 24  # pixels a chunk
SECONDS = world.CHUNK_VIDEO_FRAMES / world.FPS  # of a chunk
CENTRES = (32, 40, 48, 56, 64)  # where the target may stand in the last frame of the past
HALVES = {"tower": 5.5, "cone": 14.0, "ball": 12.5, "arch": 14.5}  # half widths in pixels, soft edges included
FARTHEST = 8  # chunks that `wander` goes beyond the point where the target left
SCRIPTS = ("hold", "wander", "turn")
TURN_CHUNKS = world.TURN // SPEED


class Trial(NamedTuple):
    """A scene, the landmark to come back to, and the camera that sees it last.

    centre: of the target in the last frame of the past, in pixels from the left edge      direction: 1 right, -1 left
    start: yaw of the first frame, in pixels
    """

    scene: world.Scene
    target: world.Landmark
    centre: int
    direction: int
    start: int

    @property
    def rate(self) -> int:
        return SPEED * self.direction

    @property
    def exit(self) -> float:
        """Pixels that the camera turns until nothing of the target is left."""
        half = HALVES[self.target.shape]
        return half + (self.centre if self.direction > 0 else world.WIDTH - self.centre)

    @property
    def out(self) -> int:
        """Chunks that the camera goes on: the first number that is more than `exit`."""
        return int(self.exit // SPEED) + 1

    def past(self) -> np.ndarray:
        """Rendered frames of the past: (9 + 12 (PRIMED - 1), H, W, 3) uint8."""
        return world.render(self.scene, world.camera_yaws([self.rate] * PRIMED, self.start))

    def hidden(self, chunks: int) -> float:
        """Seconds for which nothing of the target is in view, `chunks` lying between `out` and the way back."""
        return chunks * SECONDS + 2 * (SPEED * self.out - self.exit) * SECONDS / SPEED

    @property
    def turned_away(self) -> float:
        """Seconds for which a full turn shows nothing of the target."""
        return (world.TURN - world.WIDTH - 2 * HALVES[self.target.shape]) * SECONDS / SPEED


def draw_trial(seed: int) -> Trial:
    """The trial of a seed."""
    draw = np.random.default_rng([seed, 3])
    scene = world.random_scene(draw)
    target = scene.landmarks[int(draw.integers(len(scene.landmarks)))]
    centre, direction = int(draw.choice(CENTRES)), int(draw.choice((-1, 1)))
    turned = round(SPEED * (PRIMED - 1 + (world.FIRST_CHUNK_VIDEO_FRAMES - 1) / world.CHUNK_VIDEO_FRAMES))
    last = round(target.bearing / world.DEGREES_PER_PIXEL) - centre
    return Trial(scene, target, centre, direction, (last - direction * turned) % world.TURN)


def excursion(script: str, chunks: int, draw: np.random.Generator) -> np.ndarray:
    """How far the camera is beyond the point where it left the target, in chunks, after 0 .. `chunks` chunks.

    hold: it waits there      wander: it goes to random places up to FARTHEST away, one by one, and rests at some
    """
    places = [0]
    while script == "wander" and len(places) <= chunks:
        goal = int(draw.choice([place for place in range(FARTHEST + 1) if place != places[-1]]))
        step = 1 if goal > places[-1] else -1
        places += [*range(places[-1] + step, goal + step, step), *[goal] * int(draw.integers(3))]
    return np.asarray(places[: chunks + 1] if script == "wander" else [0] * (chunks + 1))


def leave_after(places: np.ndarray, seconds: float) -> int:
    """Chunks of an excursion after which the way back must begin for the target to be away for about `seconds`."""
    mean = np.mean([2 * (-(centre + half) % SPEED) for centre in CENTRES for half in HALVES.values()]) * SECONDS / SPEED
    needed = max(0, round((seconds - mean) / SECONDS))
    return int(np.argmax(np.arange(len(places)) + places >= needed))
