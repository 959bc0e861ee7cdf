"""Windows of the quality bench, worked out by hand with models that see angles."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from cfengine.bench.quality_windows import Windows, measure
from cfengine.errors import ConfigError

pytestmark = pytest.mark.cpu


class Compass:
    """A frame of value v looks v degrees away from frame 0 to both models; keeps count of what it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def images(self, frames):
        self.batches.append(len(frames))
        angles = torch.tensor([math.radians(float(frame[0, 0, 0])) for frame in frames])
        rows = torch.stack([angles.cos(), angles.sin()], dim=1)
        return {"dinov2": rows, "clip": rows}


def clip_of(values, fps):
    """One flat frame a value, made only when it is wanted; `made` lists the indices of those that were."""
    made = []

    def frames():
        for index, value in enumerate(values):

            def pixels(index=index, value=value):
                made.append(index)
                return np.full((2, 2, 3), value, np.uint8)

            yield Fraction(index) / fps, pixels

    return frames(), made


def windows(*times, **options) -> Windows:
    return Windows(tuple(map(Fraction, times)), **options)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_window_by_hand(batch):
    values = [0] * 6 + [60, 60, 0, 60, 60] + [90] * 5  # 4 frames/s: frames 6 to 10 are within 0.5 s of 2 s
    frames, made = clip_of(values, 4)
    compass = Compass()
    seen = measure(frames, compass, windows(2, batch=batch), torch.tensor([0.0, 1.0]))
    assert seen.frames == {2: 5} and made == [0, 6, 7, 8, 9, 10]
    assert seen.means["dinov2"][2] == pytest.approx((4 * 0.5 + 1) / 5, abs=1e-6)  # float32 cosines
    assert seen.means["clip_f"][2] == pytest.approx(0.6, abs=1e-6)
    assert seen.means["clip_t"][2] == pytest.approx(4 * math.sqrt(3) / 2 / 5, abs=1e-6)
    assert max(compass.batches) <= batch and sum(compass.batches) == 6


def test_windows_that_overlap_share_frames():
    frames, made = clip_of([0, 0, 0, 60, 90, 90, 90], 4)
    seen = measure(frames, Compass(), windows("0.5", 1))
    assert seen.frames == {Fraction(1, 2): 5, 1: 5} and made == [0, 0, 1, 2, 3, 4, 5, 6]
    assert seen.means["dinov2"] == pytest.approx({Fraction(1, 2): (3 + 0.5) / 5, 1: (1 + 0.5) / 5}, abs=1e-6)
    assert "clip_t" not in seen.means


def test_nothing_is_asked_for_after_the_last_window():
    def frames():
        for index in range(8):  # the one at 1.75 s tells that the window is over
            yield Fraction(index, 4), lambda: np.zeros((2, 2, 3), np.uint8)
        raise AssertionError("a frame at 2 s was asked for, after a window that ends at 1.5 s")

    assert measure(frames(), Compass(), windows(1)).frames == {1: 5}


def test_windows_beyond_the_end_are_left_out():
    frames, _ = clip_of([0] * 9, 4)  # the last at 2 s
    seen = measure(frames, Compass(), windows(1, 2, 3), torch.tensor([1.0, 0.0]))
    assert seen.frames == {1: 5, 2: 3} and seen.end == 2
    assert all(set(means) == {1, 2} for means in seen.means.values())
    assert measure(iter(()), Compass(), windows(1)).frames == {}


@pytest.mark.parametrize(
    ("fps", "rate", "expected"),
    [
        (16, 16, 17),  # 1.5 s to 2.5 s, both included
        (8, 16, 9),
        (32, 16, 16),  # every other frame, and those are not the ones at the ends
        (60, 4, 4),
        (24, 16, 17),  # two of three
    ],
)
def test_frames_are_thinned_to_the_rate(fps, rate, expected):
    frames, _ = clip_of([0] * (3 * fps), fps)
    assert measure(frames, Compass(), windows(2, rate=Fraction(rate))).frames == {2: expected}


def test_times_in_whole_milliseconds_lose_no_frame():
    frames = ((Fraction(round(1000 * k / 16), 1000), lambda: np.zeros((2, 2, 3), np.uint8)) for k in range(48))
    assert measure(frames, Compass(), windows(2)).frames == {2: 17}


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        ((), {}, "--at is nothing"),
        ((0, 10), {}, "--at is 0, 10"),
        ((10,), {"rate": Fraction(0)}, "--rate is 0"),
        ((10,), {"batch": 0}, "--batch is 0"),
    ],
)
def test_windows_that_cannot_be(times, options, message):
    with pytest.raises(ConfigError, match=message):
        windows(*times, **options)
