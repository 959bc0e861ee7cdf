"""Chunks of fewer passes: which stay, that the level is all that matters, and who sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cfengine import Engine
from cfengine.config import MemoryConfig, SamplerConfig
from cfengine.errors import CFEngineError, ConfigError, SnapshotError
from cfengine.playout import Playout
from cfengine.scheduler.sampler import Schedule, chunk_noise

pytestmark = pytest.mark.cpu

SMALL = MemoryConfig(slow=3)  # full after four chunks
LANES = ["toy_engine", "device_engine"]
LEVELS = (0, 2, 1, 3, 3, 0, 2, 3, 1)  # of the chunks of a stream, in which each level follows another
PASSES = (4, 3, 2, 2)  # at each level


def pixels(frames) -> bytes:
    return b"".join(frame.pixels.tobytes() for frame in frames)


def play(session, levels) -> list[bytes]:
    shown = []
    for level in levels:
        session.effort = level
        shown.append(pixels(session.next_chunk()))
    return shown


@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [
        ((1000, 750, 500, 250), 5.0, [(0, 1, 2, 3), (0, 2, 3), (0, 3)]),
        ((1000, 980, 960, 100), 1.0, [(0, 1, 2, 3), (0, 2, 3), (0, 3)]),
        ((1000, 300, 200, 100, 50), 1.0, [(0, 1, 2, 3, 4), (0, 1, 2, 4), (0, 1, 4), (0, 4)]),
        ((1000, 500), 5.0, [(0, 1)]),
        ((1000,), 5.0, [(0,)]),
    ],
)
def test_the_pass_that_is_missed_least_goes_first(steps, shift: float, expected: list) -> None:
    schedule = Schedule(SamplerConfig(steps=steps, shift=shift))
    costs = [(len(passes) + 1) / (len(steps) + 1) for passes in expected]
    assert list(schedule.efforts) == [(passes, False) for passes in expected]
    assert schedule.costs == pytest.approx(costs)
    both = Schedule(SamplerConfig(steps=steps, shift=shift), near=0.7)
    assert both.efforts == (*schedule.efforts, (expected[-1], True))
    assert both.costs == pytest.approx([*costs, (0.7 * len(expected[-1]) + 1) / (len(steps) + 1)])
    assert Schedule(SamplerConfig(steps=steps), reduced=False, near=0.7).efforts == (schedule.efforts[0],)


def test_a_reduced_chunk_is_its_passes_with_their_own_noise(toy_engine) -> None:
    """Three passes of four: 0, 2 and 3, at their timesteps, each with the noise that it has in full."""
    engine = toy_engine()
    schedule, ops = engine._schedule, engine.ops
    with engine.session("a", seed=4) as session, engine.session("a", seed=4) as other:
        session.effort = 1
        session.next_chunk()
        x = chunk_noise(4, 0, 3, 0, (16, 4, 6))
        for i, later in ((0, 2), (2, 3), (3, None)):
            noise = {0: x}  # of a chunk with one pass: nothing but its first is asked for
            flows: list = []
            one = Schedule(SamplerConfig(steps=(engine.config.sampler.steps[i],)))
            engine._scheduler.schedule = one
            memory = other._lane.memories[0]
            engine._scheduler.denoise(
                memory, other._director.keys, 0, noise.__getitem__, observe=lambda *seen, to=flows: to.append(seen[2])
            )
            engine._scheduler.schedule = schedule
            x0 = ops.flow_to_x0(x, flows[0], schedule.sigma(schedule.warped[i]))
            if later is not None:
                x = ops.renoise(x0, chunk_noise(4, 0, 3, later, (16, 4, 6)), schedule.sigma(schedule.warped[later]))
        assert torch.equal(session.latents, x0)


@pytest.mark.parametrize("lane", LANES)
def test_a_level_is_all_that_counts(request, lane: str) -> None:
    """The same levels give the same bits, on a lane that was used too; timings say what was done."""
    engine = request.getfixturevalue(lane)(memory=SMALL, efforts=True)
    shown = []
    for _ in range(2):
        with engine.session("a b", seed=5) as session:
            assert session.efforts[:3] == pytest.approx((1.0, 0.8, 0.6)) and 0.2 < session.efforts[3] < 0.6
            assert session.effort == 0
            shown.append(play(session, LEVELS))
            frame = session.next_chunk()[0]
            assert (frame.timings.effort, frame.timings.passes, frame.timings.near) == (1, 3, False)
    with engine.session("a b", seed=5) as session:
        full = play(session, [0] * len(LEVELS))
    assert shown[0] == shown[1] and full[0] == shown[0][0] and full[1] != shown[0][1]


def test_both_lanes_make_the_same(toy_engine, device_session) -> None:
    engine = toy_engine(memory=SMALL)
    with engine.session("a b", seed=5) as plain, device_session(engine, "a b", 5) as session:
        for level in LEVELS:
            plain.effort = session.effort = level
            for one, two in zip(session.next_chunk(), plain.next_chunk(), strict=True):
                assert np.abs(one.pixels.astype(int) - two.pixels).max() <= 1  # padded keys: other order of sums
                assert one.timings.passes == two.timings.passes == PASSES[level]
                assert one.timings.near == two.timings.near == (level == 3)


def test_every_level_is_a_graph_of_its_own_where_asked_for(device_engine) -> None:
    engine = device_engine(efforts=True)
    with engine.session("a") as session:
        runtime = engine._runtime
        assert runtime.captured == ["denoise", "clean", "denoise 1", "denoise 2", "denoise 3", "first", "later"]
        runtime.log.clear()
        play(session, [2, 0, 3, 1])
        replayed = [name for name in runtime.log if name.startswith("denoise")]
        assert replayed == ["denoise 2", "denoise", "denoise 3", "denoise 1"]
    plain = device_engine()
    with plain.session("a") as session:
        assert plain._runtime.captured == ["denoise", "clean", "first", "later"] and session.efforts == (1.0,)
        with pytest.raises(ConfigError, match=r"effort is 1, and this session has 1 level.*efforts=True"):
            session.effort = 1


@pytest.mark.parametrize("lane", LANES)
def test_a_batch_shares_the_passes_of_who_asks_for_the_most(request, lane: str) -> None:
    engine = request.getfixturevalue(lane)(memory=SMALL, efforts=True)
    with engine.batch(["a", "b"]) as batch:
        one, two = batch.sessions
        for levels, shared in (((2, 1), 1), ((2, 2), 2), ((0, 2), 0), ((3, 3), 3), ((3, 2), 2)):
            one.effort, two.effort = levels
            for frames in batch.next_chunk():
                assert (frames[0].timings.effort, frames[0].timings.passes) == (shared, PASSES[shared])


@pytest.mark.parametrize("lane", LANES)
def test_it_is_part_of_a_snapshot(request, device_engine, lane: str) -> None:
    engine = request.getfixturevalue(lane)(memory=SMALL, efforts=True)
    with engine.session("a", seed=2) as session:
        play(session, [0, 0, 2, 3, 3])
        snapshot = session.snapshot()
        expected = pixels(session.next_chunk())
        session.effort = 0
        session.rewind(snapshot)
        assert session.effort == 3 and pixels(session.next_chunk()) == expected
    with engine.resume(snapshot) as again:
        assert again.effort == 3 and pixels(again.next_chunk()) == expected
    with pytest.raises(SnapshotError, match=r"at effort 3 and this session has 1 level.*efforts=True"):
        device_engine(memory=SMALL).resume(snapshot)


def test_what_cannot_be_is_said(toy_engine) -> None:
    session = toy_engine().session("a")
    for level in (-1, 4, 1.0, True, None):
        with pytest.raises(ConfigError, match=r"effort is .* this session has 4 level"):
            session.effort = level
    session.close()
    with pytest.raises(CFEngineError, match="session is closed"):
        session.effort = 0


class Slowed:
    """A session on a machine that takes `load` seconds of a clock for a chunk at full effort."""

    def __init__(self, session) -> None:
        self.session, self.efforts, self.now, self.load = session, session.efforts, 0.0, 0.1
        self.passes: list[int] = []

    @property
    def effort(self) -> int:
        return self.session.effort

    @effort.setter
    def effort(self, level: int) -> None:
        self.session.effort = level

    def next_chunk(self):
        self.load = 1.2 if 1 <= len(self.passes) < 6 else 0.1
        frames = self.session.next_chunk()
        self.now += self.load * self.efforts[self.effort]
        self.passes.append(frames[0].timings.passes)
        return frames


def test_the_small_world_degrades_under_load_and_comes_back() -> None:
    """Chunks of 0.75 s: 1.2 s of work fits with two passes (0.72 s) alone; what is shown stays the session's."""
    down_and_up = [4] * 3 + [3] * 2 + [2] * 9 + [3] * 2
    with Engine.from_pretrained("tiny-world", threads=1) as engine:
        with engine.session("pan right, meadow", seed=1) as session:
            slow = Slowed(session)
            with Playout(slow, fps=16, lead=len(down_and_up), clock=lambda: slow.now) as play:
                while len(slow.passes) < len(down_and_up) and play._thread.is_alive():
                    play._thread.join(0.05)
            assert slow.passes == down_and_up and len(play._ready) == 9 + 12 * (len(down_and_up) - 1)  # and no error
            shown = pixels(session.next_chunk())
        with engine.session("pan right, meadow", seed=1) as session:
            for passes in down_and_up:
                session.effort = 4 - passes
                session.next_chunk()
            assert pixels(session.next_chunk()) == shown
