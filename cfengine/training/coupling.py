"""Noise that settles what is new: a coupling of noise and data in which the landmarks to come can be read.

With noise that has nothing to do with the data, the mean of all chunks that fit is what a network sees in much noise: a
blend of every landmark that may appear, and few passes cannot draw one of them. Flow matching allows other couplings,
and the better noise settles data, the straighter are the paths (Pooladian et al., arXiv 2304.14772; Tong et al., arXiv
2302.00482). Here the renderer knows what a chunk shows that its context does not, so ten numbers of the noise at a
column say what begins there: one, whether a landmark does; the largest of four, its shape; of five, its colour.

Noise must stay normal, for that is what a session draws. So the numbers are normal numbers that happen to say it
(nearly so in a view without a past, where they say more landmarks than they would by themselves):
- In a view without a past a landmark begins where the first number is larger than those of NEAR columns on both sides.
  Such places are as far apart as landmarks are, five columns and more, and a ninth of all (of landmarks an eighth).
- At a column that enters a view it begins where the first number is among the largest, as many of them as scenes have
  landmarks at that distance from the one before (the Rosenblatt transform).
- Where one begins, the largest of the other numbers change places with those that say its shape and its colour.
It takes long until a network finds numbers whose effects depend on one another, so at first they are written plainly.

A pass of the sampler brings new noise, in which something else is written. So only levels from COUPLED on, where a
chunk keeps next to nothing of what the pass before made, are coupled; below it, noise is independent, and what is there
is mended.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, one_hot

from cfengine.training import world
from cfengine.training.data import COLUMNS, VIEW, Batch, landmarks_of

COUPLED = 0.9  # noise level from which noise says what is new
SHAPES, COLOURS = len(world.SHAPES), len(world.COLOURS)
NEW = 15.0  # extra weight of a column that enters unseen, in losses where noise says what it is
NUMBERS = 1 + SHAPES + COLOURS  # channels of the noise that say what begins at a column
OUTSIDE = 3  # columns outside a view at which a landmark that reaches into it may begin
NEAR = 4  # columns on each side in which one number of a view without a past is the largest
LOUD = 3.0  # of plain numbers, in standard deviations
SCENES = 4000  # from which probabilities are counted
FIELDS = 300_000  # of normal numbers, from which those are taken that say where landmarks begin


@lru_cache(maxsize=1)
def chances() -> Tensor:
    """(COLUMNS,) probability that a landmark begins at a column, when the one before it did so many columns ago."""
    draw = np.random.default_rng(5)
    scenes = torch.stack([landmarks_of(world.random_scene(draw)) for _ in range(SCENES)])
    begun = beginnings(scenes)[:, :1] > 0
    return hazard(since(begun)[begun])


class Fields(NamedTuple):
    """Normal numbers for n columns, sorted by the columns at which landmarks begin.

    numbers: (FIELDS, n)      marks: (FIELDS,) sum of 2^column over those, not falling
    """

    numbers: Tensor
    marks: Tensor

    def saying(self, begins: Tensor) -> tuple[Tensor, Tensor]:
        """A random field (..., n) that says where landmarks begin (..., n), and whether there is one (...)."""
        wanted = marks_of(begins)
        first, last = (torch.searchsorted(self.marks, wanted, right=right) for right in (False, True))
        picked = first + (torch.rand(first.shape) * (last - first)).long()
        return self.numbers[picked.clamp(max=len(self.marks) - 1)], last > first


def marks_of(begins: Tensor) -> Tensor:
    """(..., n) bool -> (...) sum of 2^i over those that are true."""
    return (begins.long() << torch.arange(begins.shape[-1])).sum(-1)


def largest(numbers: Tensor) -> Tensor:
    """(N, n) -> bool, whether each is the largest of those at most NEAR away."""
    return numbers == max_pool1d(numbers[:, None], 2 * NEAR + 1, stride=1, padding=NEAR)[:, 0]


@lru_cache(maxsize=4)
def fields(columns: int) -> Fields:
    """Those of a number of columns."""
    numbers = torch.randn(FIELDS, columns, generator=torch.Generator().manual_seed(6))
    marks, order = marks_of(largest(numbers)).sort()
    return Fields(numbers[order], marks)


def hazard(counts: Tensor) -> Tensor:
    """(COLUMNS,) probability of n among the counts that are not less; 1 where none is."""
    number = torch.bincount(counts.flatten().long(), minlength=COLUMNS)[:COLUMNS].double()
    left = number.flip(0).cumsum(0).flip(0)
    return torch.where(left > 0, number / left.clamp(min=1), 1.0).float()


def beginnings(landmarks: Tensor) -> Tensor:
    """(B, 8, 3) -> (B, 2, COLUMNS) what begins at a column for a camera that turns right, and left: 0, or 1 +
    colour + COLOURS * shape. A landmark begins at the first of its columns that enters the view.
    """
    middle, shape, colour = landmarks.unbind(-1)
    narrow = (shape == world.SHAPES.index("tower")).long()  # one column on each side of its middle; others have two
    kind = torch.where(middle < 0, 0, 1 + colour + COLOURS * shape)
    found = torch.zeros(len(landmarks), 2, COLUMNS, dtype=torch.long)
    for side, column in enumerate((middle - 2 + narrow, middle + 1 - narrow)):
        found[:, side].scatter_reduce_(-1, column % COLUMNS, kind, "amax")
    return found


def since(begun: Tensor) -> Tensor:
    """(B, n, COLUMNS) bool, n = 1 or 2 cameras as in `beginnings` -> how many columns before, in the order in which a
    camera finds them, the last one began: 1 or more.
    """
    ago = torch.full(begun.shape, COLUMNS - 1)
    for back in range(COLUMNS - 1, 0, -1):
        for side, sign in enumerate((1, -1)[: begun.shape[1]]):
            ago[:, side][begun[:, side].roll(sign * back, -1)] = back
    return ago


class Entries(NamedTuple):
    """Where a camera may find something new in a chunk, n places.

    frame: (n,) of the chunk      place: (n,) from the side on which it began to look, negative outside the view
    """

    frame: Tensor
    place: Tensor


def entries(frames: int) -> Entries:
    """Every column of the first frame and OUTSIDE more before it, and of each later one the column that enters."""
    first = list(range(-OUTSIDE, VIEW))
    where = [(0, place) for place in first] + [(frame, VIEW - 1) for frame in range(1, frames)]
    return Entries(*torch.tensor(where).T)


def couple(noise: Tensor, sigma: Tensor, batch: Batch, shown: Tensor | None, plain: float = 0.0) -> Tensor:
    """Noise (K, B, C, ...) of a batch in which, at levels (K, B, C) from COUPLED on, what is new can be read.

    shown: (B, C, c, VIEW), 1 where the context shows a column      plain: share of `plain_numbers` in what is written
    -> as noise, which has 8 rows and NUMBERS channels or more, and stays what it is where the batch does not say what
    there is to see. What is written is drawn on the CPU, whatever the device.
    """
    if batch.landmarks is None or shown is None:
        return noise
    yaws, marks, shown, level = (part.cpu() for part in (batch.yaws, batch.landmarks, shown, sigma))
    frame, place = entries(yaws.shape[-1])
    turned = yaws[..., -1] - yaws[..., -2]  # (B, C)
    left = (turned < 0).long()[..., None]
    at = torch.where(left > 0, VIEW - 1 - place, place)  # (B, C, n) columns from the left edge
    inside = at.clamp(0, VIEW - 1)
    new = shown.flatten(2).gather(-1, frame * VIEW + inside) == 0
    new &= (frame == 0) | (turned != 0)[..., None]
    fresh = new[..., :1]  # nothing of what is where it begins to look is known
    where = (left * COLUMNS + (yaws[:, :, frame] + at) % COLUMNS).flatten(1)
    found = beginnings(marks)
    kind, ago = (part.flatten(1).gather(1, where).view(at.shape) for part in (found, since(found > 0)))
    kind = kind.expand(len(noise), -1, -1, -1)
    numbers = numbers_for(kind, chances()[ago])
    for part, still in ((slice(None), False), (slice(VIEW + OUTSIDE), True)):  # a camera that stands finds no more
        field, there = fields(at[..., part].shape[-1]).saying(kind[..., part] > 0)
        alone = there & fresh[..., 0] & ((turned == 0) == still)
        numbers[..., part, 0] = torch.where(alone[..., None], field, numbers[..., part, 0])
    numbers = (1 - plain) * numbers + plain * plain_numbers(kind)
    row, loud = noise.shape[-2] // 2 + (-place).clamp(min=0), (level >= COUPLED)[..., None]
    return written(noise, *(part.to(noise.device) for part in (frame, row, inside, numbers, new & loud)))


def written(noise: Tensor, frame: Tensor, row: Tensor, column: Tensor, numbers: Tensor, where: Tensor) -> Tensor:
    """Noise (K, B, C, c, channels, rows, columns) with numbers (K, B, C, n, m) in its first channels.

    frame, row: (n,)      column: (B, C, n)      where: (K, B, C, n), which of them
    """
    noise = noise.clone()
    flat = noise.permute(0, 1, 2, 3, 5, 6, 4).flatten(1, 2)  # a view
    places = (slice(None), torch.arange(flat.shape[1], device=noise.device)[:, None], frame, row, column.flatten(0, 1))
    places = (*places, slice(numbers.shape[-1]))
    flat[places] = torch.where(where.flatten(1, 2)[..., None], numbers.flatten(1, 2), flat[places])
    return noise


def numbers_for(kind: Tensor, chance: Tensor) -> Tensor:
    """Normal numbers (..., NUMBERS) that say what begins: `kind` as in `beginnings`, where something does with a
    probability of `chance`, and every shape and colour is as likely as another.
    """
    begins, drawn = kind > 0, torch.rand(kind.shape)
    share = torch.where(begins, chance * drawn, chance + (1 - chance) * drawn)
    yes = -torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))
    shape, colour = (kind - 1) // COLOURS, (kind - 1) % COLOURS
    parts = [yes[..., None]]
    for count, chosen in ((SHAPES, shape), (COLOURS, colour)):
        free = torch.randn(*kind.shape, count)
        most = free.argmax(-1, keepdim=True)
        chosen = torch.where(begins[..., None], chosen[..., None], most)
        parts.append(free.scatter(-1, most, free.gather(-1, chosen)).scatter(-1, chosen, free.amax(-1, keepdim=True)))
    return torch.cat(parts, dim=-1)


def plain_numbers(kind: Tensor) -> Tensor:
    """What `numbers_for` says, as loud as it can: numbers (..., NUMBERS) that are 0 where nothing begins."""
    shape, colour = (kind - 1).clamp(min=0) // COLOURS, (kind - 1).clamp(min=0) % COLOURS
    parts = torch.ones_like(shape[..., None]), one_hot(shape, SHAPES), one_hot(colour, COLOURS)
    return LOUD * torch.cat(parts, dim=-1) * (kind > 0)[..., None]
