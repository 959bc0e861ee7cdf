"""Geometry of the tests of memory: what is hidden, for how long, and what the sink knows."""

from __future__ import annotations

import numpy as np
import pytest

from cfengine.training import measure, trials, world

pytestmark = pytest.mark.cpu
SEEDS = range(16)


def place(trial: trials.Trial, yaw: float) -> float:
    """Middle of the target in a view, in pixels from the left edge, -240 .. 240."""
    return (trial.target.bearing / world.DEGREES_PER_PIXEL - yaw + 240) % world.TURN - 240


def seen(trial: trials.Trial, yaw: float) -> bool:
    """Whether the renderer draws any of the target there."""
    alone = world.Scene(trial.scene.look, (trial.target,), trial.scene.hills)
    nothing = world.Scene(trial.scene.look, (), trial.scene.hills)
    yaws = np.asarray([yaw])
    return bool((world.render(alone, yaws) != world.render(nothing, yaws)).any())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_past_ends_with_the_target_in_view_and_begins_without_it(seed: int) -> None:
    trial = trials.draw_trial(seed)
    yaws = world.camera_yaws([trial.rate] * trials.PRIMED, trial.start)
    assert place(trial, yaws[-1]) == pytest.approx(trial.centre)
    found = measure.landmarks_in(trial.past()[-1], trial.scene.look)
    assert (trial.target.shape, trial.target.colour) in [(s.shape, s.colour) for s in found]
    assert not any(seen(trial, yaw) for yaw in yaws[: world.FIRST_CHUNK_VIDEO_FRAMES])
    assert trial == trials.draw_trial(seed) and trial != trials.draw_trial(seed + 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("script", ["hold", "wander"])
def test_the_target_is_hidden_for_as_long_as_is_said(seed: int, script: str) -> None:
    """Along a rendered camera: counted in frames, either end is off by less than one."""
    trial = trials.draw_trial(seed)
    places = trials.excursion(script, 20, np.random.default_rng(seed))
    chunks = trials.leave_after(places, 9.0)
    moves = [trial.rate] * (trials.PRIMED + trial.out) + [int(m) * trial.rate for m in np.diff(places[: chunks + 1])]
    moves += [-trial.rate] * (int(places[chunks]) + trial.out)
    yaws = world.camera_yaws(moves, trial.start)[12 * trials.PRIMED - 3 :]
    shown = np.asarray([seen(trial, yaw) for yaw in yaws])
    first, last = np.flatnonzero(~shown)[[0, -1]]
    assert not shown[first : last + 1].any()
    assert (last - first + 1) / world.FPS == pytest.approx(
        trial.hidden(chunks + int(places[chunks])), abs=2.5 / world.FPS
    )
    assert trial.hidden(chunks + int(places[chunks])) == pytest.approx(9.0, abs=trials.SECONDS + 0.7)
    assert place(trial, yaws[-1]) == pytest.approx(trial.centre)


def test_wandering_stays_within_reach_and_rests() -> None:
    places = trials.excursion("wander", 400, np.random.default_rng(0))
    assert len(places) == 401 and places[0] == 0
    assert places.min() == 0 and places.max() == trials.FARTHEST
    assert set(np.unique(np.diff(places))) == {-1, 0, 1}
    assert not trials.excursion("hold", 9, np.random.default_rng(0)).any()
