"""What a video of the small world shows, measured with the renderer's own geometry."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cfengine.training import world

SKY_ROWS, GROUND_ROWS = slice(0, 12), slice(51, world.HEIGHT)  # no landmark and no hill ever reaches them
FIT = 0.8  # of a landmark that counts as whole; the codec's own reconstructions reach 0.86 to 0.99
_STAND = slice(12, 50)  # rows that hold landmarks
_CONTRAST = 4.0  # rounding and codec noise make about 1; hills alone make 5 to 100 where they can be seen at all
_TOLERANCE = 60.0  # distance in RGB within which a pixel belongs to a landmark colour; colours are 150 and more apart


class Seen(NamedTuple):
    """A landmark found in a frame: middle in pixels from the left edge, best shape and colour, and how well it fits.

    fit: share of pixels that landmark and best template have in common (intersection over union)
    """

    centre: float
    shape: str
    colour: str
    fit: float

    @property
    def whole(self) -> bool:
        """Whether it fits as well as what the codec reconstructs."""
        return self.fit >= FIT


def image_shift(before: np.ndarray, after: np.ndarray, reach: int = 30) -> float:
    """Pixels by which the camera's view moved to the right between two frames (H, W, 3): the shift with least squares.

    The mean squared difference of the overlap is taken at whole pixels and refined by a parabola. NaN where the view
    has nothing to hold on to: no shift is worse than the best by `_CONTRAST` squared levels of 255.
    """
    a, b = before[_STAND].astype(np.float64), after[_STAND].astype(np.float64)
    width = a.shape[1]
    errors = []
    for shift in range(-reach, reach + 1):
        left, right = (a[:, shift:], b[:, : width - shift]) if shift >= 0 else (a[:, :shift], b[:, -shift:])
        errors.append(float(((left - right) ** 2).mean()))
    best = int(np.argmin(errors))
    if max(errors) - errors[best] < _CONTRAST:
        return float("nan")
    offset = 0.0
    if 0 < best < 2 * reach:
        low, middle, high = errors[best - 1 : best + 2]
        curve = low - 2 * middle + high
        offset = 0.5 * (low - high) / curve if curve > 0 else 0.0
    return best - reach + offset


def gradient_energy(frames: np.ndarray) -> float:
    """Mean squared difference between neighbouring pixels of (n, H, W, 3), over rows and columns."""
    wide = frames.astype(np.float64)
    return float((np.diff(wide, axis=1) ** 2).mean() + (np.diff(wide, axis=2) ** 2).mean())


def palette_error(frame: np.ndarray, look: world.Look) -> float:
    """Mean absolute difference (levels of 255) of pure sky and pure ground from the look's own colours."""
    sky, ground, _ = world.backdrop(look)
    errors = [
        np.abs(frame[rows].astype(np.float64) - colours[rows][:, None]).mean()
        for rows, colours in ((SKY_ROWS, sky), (GROUND_ROWS, ground))
    ]
    return float(max(errors))


def colour_mask(frame: np.ndarray, colour: str, look: world.Look) -> np.ndarray:
    """(H, W) bool: pixels that are nearest to this landmark colour and within tolerance of it.

    Rivals are the other colours, hill, and the row's sky and ground.
    """
    pixels = frame.astype(np.float64)
    sky, ground, hill = world.backdrop(look)
    own = np.linalg.norm(pixels - world.landmark_colour(colour, look), axis=-1)
    rivals = [world.landmark_colour(c, look) for c in world.COLOURS if c != colour]
    rivals += [sky[:, None], ground[:, None], hill]
    others = np.min([np.linalg.norm(pixels - rival, axis=-1) for rival in rivals], axis=0)
    return (own < _TOLERANCE) & (own < others)


def _templates() -> dict[str, np.ndarray]:
    """Masks of every shape at quarter-pixel offsets: (4, H, 40), middle at column 20 + offset."""
    row, column = (np.arange(world.HEIGHT) + 0.5)[:, None], np.arange(40) + 0.5
    return {
        shape: np.stack([world.coverage(shape, column - 20 - q / 4, row - world.BASE) > 0.5 for q in range(4)])
        for shape in world.SHAPES
    }


def match(mask: np.ndarray, first: int, last: int) -> tuple[str, float, float]:
    """Best shape, its fit (intersection over union) and middle for the pixels of columns first..last of a mask."""
    wide = np.pad(mask, ((0, 0), (20, 21)))
    inside = np.zeros(wide.shape, dtype=bool)
    inside[:, 20 + first : 21 + last] = wide[:, 20 + first : 21 + last]
    guess = (first + last + 1) / 2
    best = ("", 0.0, guess)
    for shape, masks in _templates().items():
        for middle in range(int(guess) - 3, int(guess) + 4):
            window = inside[:, middle : middle + 40]
            total = inside.sum()
            for q in range(4):
                common = (window & masks[q]).sum()
                fit = common / (total + masks[q].sum() - common)
                if fit > best[1]:
                    best = (shape, float(fit), middle + q / 4)
    return best


def landmarks_in(frame: np.ndarray, look: world.Look, least: int = 40) -> list[Seen]:
    """Find the landmarks that are wholly inside a frame: runs of columns of one colour with at least `least` pixels."""
    seen = []
    for colour in world.COLOURS:
        mask = colour_mask(frame, colour, look)
        filled = np.pad(mask.any(axis=0), 4)
        # an arch has no gap in columns; tolerate one of up to three columns where a colour flickers
        filled = np.array([filled[max(0, i - 2) : i + 3].any() for i in range(len(filled))])[4:-4]
        edges = np.flatnonzero(np.diff(np.pad(filled.astype(int), 1)))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            columns = np.flatnonzero(mask[:, begin:end].any(axis=0))
            first, last = begin + columns[0], begin + columns[-1]
            if first < 1 or last > world.WIDTH - 2 or mask[:, first : last + 1].sum() < least:
                continue
            shape, fit, middle = match(mask, first, last)
            seen.append(Seen(middle, shape, colour, fit))
    return sorted(seen)


def palette_distance(frame: np.ndarray, look: world.Look) -> float:
    """Distance of the colours of pure sky and pure ground from the look's own, in levels of 255.

    The mean over channels of the Wasserstein-1 distance between the two histograms; the worse of sky and ground.
    """
    sky, ground, _ = world.backdrop(look)
    distances = []
    for rows, colours in ((SKY_ROWS, sky), (GROUND_ROWS, ground)):
        shown = np.sort(frame[rows].reshape(-1, 3).astype(np.float64), axis=0)
        wanted = np.sort(np.repeat(colours[rows], frame.shape[1], axis=0), axis=0)
        distances.append(np.abs(shown - wanted).mean())
    return float(max(distances))
