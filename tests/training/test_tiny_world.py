"""The shipped model keeps its promises on a part of the evaluation; `python -m cfengine.bench.world` is the whole."""

from __future__ import annotations

from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from cfengine import Engine
from cfengine.bench import world as bench
from cfengine.sources import WEIGHTS
from cfengine.training import measure, world

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def values() -> dict[str, float]:
    with torch.inference_mode(), Engine.from_pretrained("tiny-world") as engine:
        return bench.evaluate(engine, range(2), seconds=8)


def test_weights_fit_the_package() -> None:
    assert sum(path.stat().st_size for path in (WEIGHTS / "tiny-world").glob("*.safetensors")) <= 20e6


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        # 0.999 and 1.0 in the whole evaluation, 1.0 in these two seeds
        ("pan_chunks_within_25_percent", 0.9),
        ("primed_landmark_views_right", 0.9),
        # 0.54 and 0.90 in these two seeds of 8 s, with few landmarks in view; landmarks that change from chunk to chunk
        # would give 0, and another instruction set rounds otherwise
        ("landmark_views_right", 0.3),
        ("sharpness", 0.7),
        # these hold in every single view
        ("palette_views_right", 1.0),
    ],
)
def test_a_small_part_of_the_evaluation(values: dict[str, float], name: str, limit: float) -> None:
    assert values[name] >= limit


def test_hold_stands_still(values: dict[str, float]) -> None:
    assert values["hold_shift_worst"] < 0.5


def test_a_frozen_video_would_fail() -> None:
    """The evaluation sees a camera that does not move, and a colour that is wrong."""

    frame = world.render(world.random_scene(np.random.default_rng(0)), np.array([0.0]))[0]
    assert abs(measure.image_shift(frame, frame)) < 0.01
    seen = [measure.Seen(48.0, "ball", "red", 1.0)]
    assert bench.follow(seen, [measure.Seen(32.0, "ball", "red", 0.9)], 16) == (1, 1)
    assert bench.follow(seen, [measure.Seen(48.0, "ball", "red", 0.9)], 16) == (0, 1)
    assert bench.follow(seen, [measure.Seen(32.0, "ball", "blue", 0.9)], 16) == (0, 1)
    assert bench.follow(seen, [measure.Seen(32.0, "ball", "red", 0.5)], 16) == (0, 1)
    assert bench.follow(seen, [], 16) == (0, 1)
    assert bench.follow(seen, [], 48) == (0, 0)


def test_the_camera_is_the_one_that_is_asked_for(monkeypatch) -> None:
    streamed = []

    def stop(session, rates, look) -> None:
        streamed.append(rates)
        raise InterruptedError

    monkeypatch.setattr(bench, "stream", stop)
    for camera in ("script", "ratchet"):
        with pytest.raises(InterruptedError):
            bench.measure_free(MagicMock(), 3, 28, {}, bench.How(camera=camera))
    script, ratchet = streamed
    assert len(script) == len(ratchet) == 28 and (script != ratchet).any()
    assert {-24, 24} <= set(ratchet) <= {-24, 0, 24}


def test_how_many_kinds_there_are() -> None:
    marks = [measure.Seen(x, "ball", colour, fit) for x, colour, fit in ((80.0, "red", 0.9), (16.0, "red", 0.9))]
    here = np.zeros(1)
    assert bench.alike([marks], here) == (1, 1) and bench.alike([marks[:1]], here) == bench.alike([[]], here) == (0, 0)
    moved = [mark._replace(centre=mark.centre - 8) for mark in marks]
    assert bench.alike([marks, moved], np.asarray([0, 8])) == (1, 1), "the same two, seen again"
    assert bench.alike([marks, marks], np.asarray([0, 160])) == (2, 2), "two more of them, elsewhere"
    between = measure.Seen(48.0, "ball", "blue", 0.9)
    assert bench.alike([[*marks, between]], here) == (0, 2)
    assert bench.alike([[*marks, between._replace(fit=0.5)]], here) == (1, 1), "neighbours are those that are whole"
    assert bench.effective([]) == 0 and bench.effective(["ball"] * 5) == 1
    assert bench.effective(["ball", "cone", "arch", "tower"] * 3) == pytest.approx(4)
    assert 1 < bench.effective(["ball"] * 9 + ["cone"]) < 1.5
