"""Windows of time in a video, and how like its first frame and its prompt the frames in them are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from torch import Tensor

from cfengine.errors import ConfigError

HALF = Fraction(1, 2)  # seconds on either side of a window's time, as the paper has it
MEASURES = {  # name: what is averaged over the frames f of a window, all vectors of unit length
    "dinov2": "<dinov2(f), dinov2(frame 0)>",
    "clip_f": "<clip_image(f), clip_image(frame 0)>",
    "clip_t": "<clip_image(f), clip_text(prompt)>",
}

Timed = tuple[Fraction, Callable[[], np.ndarray]]
"""Seconds since the first frame, and what makes its pixels, (height, width, 3) uint8 RGB, where they are wanted."""


class Eyes(Protocol):
    """What turns frames into vectors."""

    def images(self, frames: list[np.ndarray]) -> dict[str, Tensor]:
        """frames -> {"dinov2": (frames, d), "clip": (frames, e)}, rows of unit length on the CPU."""
        ...


@dataclass(frozen=True)
class Windows:
    """times: of the windows, seconds, rising      rate: most frames a second that are looked at      batch: at once."""

    times: tuple[Fraction, ...]
    rate: Fraction = Fraction(16)
    batch: int = 16

    def __post_init__(self) -> None:
        if not self.times or min(self.times) <= 0:
            shown = ", ".join(map(seconds, self.times)) or "nothing"
            raise ConfigError(f"--at is {shown}; give times in seconds above 0, such as 10,20,30")
        if self.rate <= 0:
            raise ConfigError(f"--rate is {seconds(self.rate)}; give frames a second above 0, such as 16")
        if self.batch < 1:
            raise ConfigError(f"--batch is {self.batch}; it must be at least 1")

    def around(self, time: Fraction) -> list[Fraction]:
        """Windows that a frame lies in: |time - t| <= HALF, both ends included."""
        return [t for t in self.times if abs(time - t) <= HALF]

    def slot(self, time: Fraction) -> int:
        """Which 1 / rate of the video is nearest; rounding forgives files that keep whole milliseconds."""
        return math.floor(time * self.rate + Fraction(1, 2))


@dataclass(frozen=True)
class Measured:
    """What one video scored.

    frames: window -> frames looked at      means: measure -> window -> mean cosine      end: time of the last frame
    Windows without a frame are in neither; a measure that had nothing to compare with is not in `means`.
    """

    frames: dict[Fraction, int]
    means: dict[str, dict[Fraction, float]]
    end: Fraction


class Sums:
    """Cosines added up per window.  first: the vectors of frame 0      text: (e,) the prompt's, or None."""

    def __init__(self, first: dict[str, Tensor], text: Tensor | None) -> None:
        self.against = {"dinov2": ("dinov2", first["dinov2"][0]), "clip_f": ("clip", first["clip"][0])}
        if text is not None:
            self.against["clip_t"] = ("clip", text)
        self.frames: dict[Fraction, int] = {}
        self.sums: dict[str, dict[Fraction, float]] = {measure: {} for measure in self.against}

    def add(self, windows: list[list[Fraction]], vectors: dict[str, Tensor]) -> None:
        """Count a batch. windows: of every frame."""
        for inside in windows:
            for t in inside:
                self.frames[t] = self.frames.get(t, 0) + 1
        for measure, (kind, other) in self.against.items():
            sums = self.sums[measure]
            for inside, cosine in zip(windows, (vectors[kind] @ other).tolist(), strict=True):
                for t in inside:
                    sums[t] = sums.get(t, 0.0) + cosine

    def measured(self, end: Fraction) -> Measured:
        """Means of what was counted."""
        means = {name: {t: total / self.frames[t] for t, total in sums.items()} for name, sums in self.sums.items()}
        return Measured(self.frames, means, end)


def measure(frames: Iterable[Timed], eyes: Eyes, windows: Windows, text: Tensor | None = None) -> Measured:
    """Mean cosines of the frames in each window with frame 0 and with the prompt.

    A frame in a window is left out where it has the slot of the frame before it, so no more than `rate` a second count.
    At most one batch of frames is held, and no frame after the last window is asked for.
    """
    sums, end, last = None, Fraction(0), None
    inside: list[list[Fraction]] = []
    waiting: list[np.ndarray] = []
    for time, pixels in frames:
        if time > windows.times[-1] + HALF:
            break
        if sums is None:
            sums = Sums(eyes.images([pixels()]), text)
        end, slot, around = time, windows.slot(time), windows.around(time)
        if around and slot != last:
            inside.append(around)
            waiting.append(pixels())
        last = slot
        if len(waiting) == windows.batch:
            sums.add(inside, eyes.images(waiting))
            inside, waiting = [], []
    if sums is None:
        return Measured({}, {}, end)
    if waiting:
        sums.add(inside, eyes.images(waiting))
    return sums.measured(end)


def seconds(time: Fraction) -> str:
    """A time as it is written: 10, 0.5."""
    return f"{float(time):g}"
