"""Noise that says what is new: it stays normal, and what is new can be read in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cfengine.training import coupling, world
from cfengine.training.coupling import COLOURS, COUPLED, NUMBERS, couple
from cfengine.training.data import COLUMNS, VIEW, Batch, Strips, landmarks_of
from cfengine.training.seen import seen_columns

pytestmark = pytest.mark.cpu

LOUD, QUIET = torch.tensor([1.0, 0.6])[:, None, None]


def scenes(count: int, seed: int = 1) -> list[world.Scene]:
    draw = np.random.default_rng(seed)
    return [world.random_scene(draw) for _ in range(count)]


def batch(places: list[world.Scene], chunks: int, seed: int = 0) -> Batch:
    """One session a scene, of latents that show nothing."""
    marks = torch.stack([landmarks_of(scene) for scene in places])
    words = torch.tensor([3, 6, 9]).expand(len(places), 2, 3).clone()
    strips = Strips(torch.zeros(len(places), 2, COLUMNS, 8, 16), words, marks)
    return strips.draw(len(places), chunks, np.random.default_rng(seed))


def everything_before(given: Batch) -> torch.Tensor:
    """(B, C, c, VIEW), 1 where any chunk before showed a column: a memory that forgets nothing."""
    columns = seen_columns(given.yaws).column
    shown = torch.zeros(columns.shape)
    for chunk in range(1, columns.shape[1]):
        known = torch.zeros(len(columns), COLUMNS).scatter_(-1, columns[:, :chunk].flatten(1), 1.0)
        shown[:, chunk] = known.gather(-1, columns[:, chunk].flatten(1)).view(shown[:, chunk].shape)
    return shown


def read(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape and colour that numbers (..., NUMBERS) say."""
    return numbers[..., 1 : NUMBERS - COLOURS].argmax(-1), numbers[..., NUMBERS - COLOURS :].argmax(-1)


def test_noise_stays_normal_and_independent() -> None:
    """1,600 sessions: an estimated mean is off by 0.025, a correlation too; six times that is no accident.

    The first numbers of a first view are off by up to about 0.08: they say a ninth, and of landmarks it is an eighth.
    """
    torch.manual_seed(0)
    given = batch(scenes(1600), 3)
    noise = torch.randn(1, *given.latents.shape)
    made = couple(noise, LOUD.expand(1, *noise.shape[1:3]), given, everything_before(given))
    first = made[0, :, 0, 0, :NUMBERS, 4].flatten(1)  # every column of the first view
    turned = given.yaws[:, 2, 2] - given.yaws[:, 2, 1]
    entering = made[0, turned > 0, 2, :, :NUMBERS, 4, VIEW - 1].flatten(1)
    for numbers in (first, entering):
        bound = 6 * len(numbers) ** -0.5
        assert numbers.mean(0).abs().max() < bound
        assert (numbers.var(0) - 1).abs().max() < bound * 2**0.5
        assert (torch.corrcoef(numbers.T) - torch.eye(numbers.shape[1])).abs().max() < bound
    assert (made != noise).float().mean() > 0.001


def test_what_enters_can_be_read() -> None:
    """One landmark in the middle of a first view, another that enters on the right in the second chunk."""
    marks = (world.Landmark(40 * 0.75, "arch", "blue"), world.Landmark(112 * 0.75, "tower", "cyan"))
    scene = world.Scene(world.Look(), marks, ((3, 1.0, 0.0), (6, 1.0, 0.0), (9, 1.0, 0.0)))
    given = batch([scene], 1)
    yaws = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    given = given._replace(latents=torch.zeros(1, 2, 3, 16, 8, 12), yaws=yaws)
    shown = everything_before(given)
    torch.manual_seed(1)
    noise = torch.randn(2, *given.latents.shape)
    made = couple(noise, torch.stack([LOUD, QUIET]).view(2, 1, 1).expand(2, 1, 2), given, shown)
    assert torch.equal(made[1], noise[1]), "below COUPLED noise knows nothing"
    arch = made[0, 0, 0, 0, :NUMBERS, 4, 3]  # columns 3 to 6
    assert read(arch) == (world.SHAPES.index("arch"), list(world.COLOURS).index("blue"))
    # the tower is in columns 13 and 14: column 13 enters with the last frame of the first chunk
    tower = made[0, 0, 0, 2, :NUMBERS, 4, VIEW - 1]
    assert read(tower) == (world.SHAPES.index("tower"), list(world.COLOURS).index("cyan"))
    assert not coupling.chances()[1:4].any(), "nothing can begin one to three columns after it"
    changed = (made[0] != noise[0]).any(dim=3)[0, 1]  # (c, rows, columns) of the second chunk
    assert changed.nonzero().tolist() == [[frame, 4, VIEW - 1] for frame in range(3)]


def test_where_landmarks_begin_in_a_first_view_can_be_read() -> None:
    """The renderer's own scenes: the first number is the largest near where a landmark begins, and nowhere else."""
    torch.manual_seed(3)
    given = batch(scenes(200), 1)
    noise = torch.randn(1, *given.latents.shape)
    made = couple(noise, LOUD.expand(1, *noise.shape[1:3]), given, everything_before(given))[0, :, 0]
    yaws, found = given.yaws[:, 0], coupling.beginnings(given.landmarks) > 0
    right = 0
    for session in range(200):
        turned = int(yaws[session, 2] - yaws[session, 1])
        side, edge = int(turned < 0), 0 if turned >= 0 else VIEW - 1
        outside = [made[session, 0, 0, row, edge] for row in (7, 6, 5)]
        inside = made[session, 0, 0, 4].flip(-1) if side else made[session, 0, 0, 4]
        later = [made[session, frame, 0, 4, VIEW - 1 - edge] for frame in (1, 2)] if turned else []
        numbers = torch.stack([*outside, *inside, *later])
        step = -1 if side else 1
        columns = (int(yaws[session, 0]) + edge + step * torch.arange(-3, len(numbers) - 3)) % COLUMNS
        right += int(torch.equal(coupling.largest(numbers[None])[0], found[session, side, columns]))
    assert right >= 196, "of 1,000 views about 5 show what no field says"


def test_landmarks_that_enter_are_as_likely_as_those_of_scenes() -> None:
    counted = coupling.chances()
    assert counted[:4].sum() == 0 and counted[13] == 1, "five columns apart, and they begin one off at most"
    torch.manual_seed(2)
    begun, ago = torch.zeros(4000, dtype=torch.long), torch.full((4000,), 5)
    for _ in range(200):
        begins = torch.special.ndtr(-torch.randn(4000)) < counted[ago]
        begun, ago = begun + begins, torch.where(begins, 1, ago + 1)
    assert float(begun.float().mean()) / 200 == pytest.approx(7.5 / COLUMNS, rel=0.02)


def test_numbers_are_plain_at_first() -> None:
    given = batch(scenes(50), 1)
    noise = torch.randn(1, *given.latents.shape)
    made = couple(noise, LOUD.expand(1, *noise.shape[1:3]), given, everything_before(given), plain=1.0)
    numbers = made[0, :, 0, 0, :NUMBERS, 4]
    assert set(numbers.unique().tolist()) == {0.0, coupling.LOUD}
    assert set(numbers.sum(1).unique().tolist()) == {0.0, 3 * coupling.LOUD}, "nothing, or all of yes, shape and colour"


def test_a_batch_that_does_not_say_what_is_there_keeps_its_noise() -> None:
    given = batch(scenes(2), 2)
    noise, shown = torch.randn(1, *given.latents.shape), everything_before(given)
    loud = torch.full((1, 2, 2), COUPLED)
    assert couple(noise, loud, given._replace(landmarks=None), shown) is noise
    assert couple(noise, loud, given, None) is noise
    assert torch.equal(couple(noise, loud, given, torch.ones(2, 2, 3, VIEW)), noise), "everything is known"
    assert not torch.equal(couple(noise, loud, given, shown), noise)
