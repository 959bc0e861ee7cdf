"""Snapshots: whatever is done with one, the stream goes on bit for bit as if nothing had been done."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfengine import Engine, Reset
from cfengine.config import POLICIES, MemoryConfig, PrecisionConfig, with_policy
from cfengine.session import Session
from cfengine.snapshot import Snapshot

pytestmark = pytest.mark.cpu

SMALL = MemoryConfig(slow=3)  # full after four chunks
PROMPTS = ("a", "b c", "d e f g", "h")
DETOURS = ("snapshot", "file", "branch", "rewind", "other")


class Seen(NamedTuple):
    """What a consumer gets of a frame, but for the time that work took."""

    pixels: bytes
    index: int
    time: float
    event: int
    since: int | None
    chunk: int
    happened: object
    events: tuple[int, ...]
    passes: int
    cut: bool


def seen(frames) -> list[Seen]:
    return [
        Seen(f.pixels.tobytes(), f.index, f.time, f.last_event_id, f.applied_at_chunk, f.timings.chunk,
             f.timings.memory, tuple(receipt.event_id for receipt in f.timings.events), f.timings.passes, f.cut)
        for f in frames
    ]  # fmt: skip


class Player:
    """Plays a schedule; some of its steps are detours that must not be seen."""

    def __init__(self, engine: Engine, folder, prompt: str = "a b") -> None:
        self.engine, self.folder = engine, folder
        self.session = engine.session(prompt, seed=7)
        self.log: list[Seen] = []

    def play(self, schedule) -> list[Seen]:
        for what, *how in schedule:
            getattr(self, what)(*how)
        self.chunk()
        self.session.close()
        return self.log

    def chunk(self) -> None:
        self.log += seen(self.session.next_chunk())

    def prompt(self, text: str, switch: str) -> None:
        self.session.set_prompt(text, switch)

    def reset(self, seed: int | None) -> None:
        self.session.push(Reset(seed), wait=True)

    def effort(self, level: int) -> None:
        self.session.effort = level

    def prime(self, seed: int) -> None:
        self.session.prime(torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(seed)))

    def detour(self, kind: str) -> None:
        getattr(self, f"_{kind}")()

    def _snapshot(self) -> None:
        self.session.snapshot()

    def _go_on(self, session: Session) -> None:
        self.session.close()
        self.session = session

    def _file(self) -> None:
        self.session.snapshot().save(self.folder / "s.safetensors")
        self._go_on(self.engine.resume(Snapshot.load(self.folder / "s.safetensors")))

    def _astray(self, session: Session) -> None:
        session.set_prompt("x", "recache")
        session.next_chunk()
        session.set_prompt("y z", "blend(2)")
        session.push(Reset(9), wait=True)
        session.effort = len(session.efforts) - 1
        session.next_chunk()

    def _branch(self) -> None:
        """The branch goes on, after what it came from went another way."""
        branch = self.session.branch()
        self._astray(self.session)
        self._go_on(branch)

    def _other(self) -> None:
        """What it came from goes on, after the branch went another way."""
        with self.session.branch() as branch:
            self._astray(branch)

    def _rewind(self) -> None:
        snapshot = self.session.snapshot()
        self._astray(self.session)
        self.session.rewind(snapshot)


class Wanderer(Player):
    """A player in the small world, which knows few words."""

    def _astray(self, session: Session) -> None:
        session.set_prompt("pan left, snow", "recache")
        session.next_chunk()


def steps(policy: str):
    """Steps of a schedule."""
    switches = ["cross", "recache", "blend(2)", "blend(4)"]
    if policy in ("fifo", "sink_window", "relative_window"):
        switches.append("flush")
    return st.one_of(
        st.just(("chunk",)),
        st.just(("chunk",)),
        st.tuples(st.just("prompt"), st.sampled_from(PROMPTS), st.sampled_from(switches)),
        st.tuples(st.just("prime"), st.integers(0, 3)),
        st.tuples(st.just("reset"), st.sampled_from([None, 5])),
        st.tuples(st.just("effort"), st.integers(0, 3)),
        st.tuples(st.just("detour"), st.sampled_from(DETOURS)),
    )


def told(log: list[Seen], numbers: bool) -> list:
    """A log, without numbers of events where they are not those of the plain stream."""
    return log if numbers else [entry._replace(event=0, events=()) for entry in log]


def check_schedules(engine: Engine, policy: str, folder, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(steps(policy), max_size=12), st.integers(0, 6))
    def run(schedule, before: int) -> None:
        schedule = [("chunk",)] * before + schedule
        plain = [step for step in schedule if step[0] != "detour"]
        rewound = ("detour", "rewind") in schedule  # numbers of events that went astray are not given again
        expected = Player(engine, folder).play(plain)
        assert told(Player(engine, folder).play(schedule), not rewound) == told(expected, not rewound)

    run()
    assert not engine._sessions


@pytest.mark.parametrize("policy", POLICIES)
def test_detours_are_not_seen(toy_engine, tmp_path, policy):
    check_schedules(toy_engine(memory=with_policy(SMALL, policy)), policy, tmp_path, examples=8)


@pytest.mark.parametrize("policy", ["slow_fast", "sink_window"])
def test_detours_are_not_seen_on_the_lane_of_a_gpu(device_engine, tmp_path, policy):
    check_schedules(device_engine(memory=with_policy(SMALL, policy), efforts=True), policy, tmp_path, examples=8)


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["toy_engine", "device_engine"])
@pytest.mark.parametrize("policy", POLICIES)
def test_many_detours_are_not_seen(request, tmp_path, policy, lane):
    engine = request.getfixturevalue(lane)(memory=with_policy(SMALL, policy), efforts=True)
    check_schedules(engine, policy, tmp_path, examples=40)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["slow_fast_paper", "slow_fast"])
def test_detours_of_the_small_world_are_not_seen(tmp_path, policy):
    """Real weights, codec and text, until the memory is full."""
    turns = [("prompt", "pan left, snow, night", "cross"), ("chunk",), ("prompt", "pan right, desert", "recache")]
    blend = [("prompt", "hold, meadow", "blend(3)"), ("chunk",)]
    detours = [("detour", kind) for kind in DETOURS]
    parts = [("chunk",)] * 4, detours[:2], turns, [("chunk",)] * 4, blend, detours[2:], [("chunk",)] * 3
    schedule = [step for part in parts for step in part]
    with Engine.from_pretrained("tiny-world", policy=policy) as engine:
        plain, other = (Wanderer(engine, tmp_path, "pan right over a desert at sunset") for _ in range(2))
        expected = plain.play([step for step in schedule if step[0] != "detour"])
        assert told(other.play(schedule), False) == told(expected, False)


@pytest.mark.parametrize("codec", ["tiny_world", "taehv"])
def test_pasts_of_decoders_are_part_of_it(toy_engine, tmp_path, codec):
    from cfengine.codec.taehv import TAEHV, TAEHVCodec
    from cfengine.codec.tiny_world import TinyWorldCodec

    torch.manual_seed(0)
    engine = toy_engine()
    engine._lanes.codec = TAEHVCodec(TAEHV()) if codec == "taehv" else TinyWorldCodec()
    plain = [("chunk",)] * 3
    detours = [("chunk",), ("detour", "file"), ("chunk",), ("detour", "branch"), ("detour", "other"), ("chunk",)]
    assert Player(engine, tmp_path).play(plain) == Player(engine, tmp_path).play(detours)


@pytest.mark.parametrize("lane", ["toy_engine", "device_engine"])
def test_scenes_and_cuts_are_part_of_it(request, tmp_path, lane):
    """Taken before, at and after the chunk that opens a scene, in the middle of a blend into others."""
    memory = MemoryConfig(policy="relative_window", sink=1, slow=0, fast=5, scenes=True)
    engine = request.getfixturevalue(lane)(memory=memory)
    scenes = "a[0.75s#] | b[1.5s] | c"
    turn = ("prompt", "d[0.75s] | e[0.75s#] | f", "blend(4)")
    plain = [("chunk",)] * 3 + [turn] + [("chunk",)] * 5
    detours = [step for each in plain for step in (("detour", "file"), ("detour", "other"), each)]
    expected = Player(engine, tmp_path, scenes).play(plain)
    assert told(Player(engine, tmp_path, scenes).play(detours), False) == told(expected, False)


def test_pages_in_e4m3(toy_engine, tmp_path):
    """Their values are not contiguous, and they have scales."""
    config = dataclasses.replace(toy_engine().config, memory=SMALL, precision=PrecisionConfig(pages="fp8"))
    engine = toy_engine(config)
    plain = [("chunk",)] * 5
    detours = [("chunk",)] * 3 + [("detour", "file"), ("chunk",), ("detour", "rewind"), ("chunk",)]
    assert told(Player(engine, tmp_path).play(plain), False) == told(Player(engine, tmp_path).play(detours), False)
