"""Sessions in lock-step see what they see alone, whoever joins, leaves or fails beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfengine.config import MemoryConfig, with_policy
from cfengine.errors import CapacityError, CFEngineError, ConfigError, DeviceError, FaultError, PromptError
from cfengine.events import Prompt

pytestmark = pytest.mark.cpu

PROMPTS, SEEDS = ("a b", "c", "d e f g"), (4, 5, 6)
SMALL = MemoryConfig(slow=3)  # full after four chunks
# float32; products over more rows may sum in another order, over four passes and two blocks
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LANES = ("toy_engine", "device_engine")


def check_same(session, single, frames, expected) -> None:
    """A chunk of a session in a batch is that of the same session alone."""
    torch.testing.assert_close(session.latents, single.latents, **CLOSE)
    assert [frame.index for frame in frames] == [frame.index for frame in expected]
    assert all(
        np.abs(one.pixels.astype(int) - two.pixels).max() <= 1  # where a value sits on a rounding edge
        for one, two in zip(frames, expected, strict=True)
    )
    assert frames[0].timings.memory == expected[0].timings.memory


class Pairs:
    """A batch, and each of its sessions once more alone."""

    def __init__(self, engine, batch) -> None:
        self.engine, self.batch = engine, batch
        self.single = {}

    def join(self, prompt: str, seed: int, policy: str | None = None):
        session = self.batch.join(prompt, seed=seed, policy=policy)
        self.single[session] = self.engine.session(prompt, seed=seed, policy=policy)
        return session

    def leave(self, session) -> None:
        session.close()
        self.single.pop(session).close()

    def chunk(self) -> None:
        sessions = self.batch.sessions
        for session, frames in zip(sessions, self.batch.next_chunk(), strict=True):
            check_same(session, self.single[session], frames, self.single[session].next_chunk())


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("policy", ["slow_fast", "slow_fast_paper", "sink_window"])
def test_a_batch_equals_single_sessions(request, policy, lane):
    engine = request.getfixturevalue(lane)(memory=with_policy(SMALL, policy))
    alone = [engine.session(prompt, seed=seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    with engine.batch(PROMPTS, seeds=SEEDS) as batch:
        for number in range(6):
            if number == 3:
                batch.sessions[1].set_prompt("x y z")
                alone[1].set_prompt("x y z")
            for session, single, frames in zip(batch.sessions, alone, batch.next_chunk(), strict=True):
                check_same(session, single, frames, single.next_chunk())


class Company(Pairs):
    """Sessions of a batch by number, in random company."""

    def of(self, number: int):
        return self.batch.sessions[number % len(self.batch.sessions)] if self.batch.sessions else None

    def come(self, number: int) -> None:
        if len(self.batch.sessions) < 4:
            self.join(PROMPTS[number % 3], number)

    def go(self, number: int) -> None:
        if self.batch.sessions:
            self.leave(self.of(number))

    def prompt(self, number: int) -> None:
        for session in filter(None, (self.of(number), self.single.get(self.of(number)))):
            session.set_prompt("x y", ("cross", "recache", "flush")[number % 3])

    def turn_back(self, number: int) -> None:
        """Go on from what the single one is, or back to what the one of the batch was."""
        session = self.of(number)
        if session is not None:
            session.rewind(self.single[session].snapshot())

    def copy(self, number: int) -> None:
        """Another session that goes on from here, in the batch and alone."""
        session = self.of(number)
        if session is not None and len(self.batch.sessions) < 4:
            with session.branch() as branch:
                other = self.batch.join("h")
                other.rewind(branch.snapshot())
            self.single[other] = self.single[session].branch()


STEPS = ("chunk", "chunk", "chunk", "chunk", "come", "come", "go", "prompt", "turn_back", "copy")


def check_company(make, examples: int) -> None:
    """Under a rule that compares nothing, so that rounding of larger products decides nothing."""
    engine = make(memory=with_policy(SMALL, "sink_window"), max_sessions=9)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 11)), max_size=18))
    def run(schedule) -> None:
        with engine.batch() as batch:
            company = Company(engine, batch)
            for what, number in [("come", 0), ("come", 1), ("chunk", 0), *schedule, ("chunk", 0)]:
                company.chunk() if what == "chunk" else getattr(company, what)(number)
        for single in company.single.values():
            single.close()
        assert engine.pages.in_use == 0

    run()


@pytest.mark.parametrize("lane", LANES)
def test_any_company(request, lane):
    check_company(request.getfixturevalue(lane), examples=4)


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES)
def test_much_company(request, lane):
    check_company(request.getfixturevalue(lane), examples=30)


@pytest.mark.parametrize("lane", LANES)
def test_sessions_join_and_leave(request, lane):
    """Between chunks, in any order; on a GPU another session then changes its place."""
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=6)
    with engine.batch() as batch:
        assert batch.next_chunk() == []
        pairs = Pairs(engine, batch)
        first = pairs.join("a b", 4)
        pairs.chunk()
        second, third = pairs.join("c", 5), pairs.join("d e f", 6)
        for _ in range(4):
            pairs.chunk()
        pairs.leave(first)
        assert batch.sessions == [second, third]
        second.set_prompt("x y", "recache")
        pairs.single[second].set_prompt("x y", "recache")
        pairs.chunk()
        fourth = pairs.join("h", 7)
        pairs.chunk()
        pairs.leave(third)
        pairs.chunk()
        batch.leave(fourth)
        pairs.single.pop(fourth).close()
        pairs.chunk()
        assert batch.sessions == [second] and not second.closed
        with pytest.raises(CFEngineError, match="not one of this batch"):
            batch.leave(fourth)
    assert second.closed and engine.pages.reserved == engine.pages.total // 6  # of the single one


def test_policies_side_by_side(toy_engine):
    engine = toy_engine(memory=SMALL, max_sessions=6)
    with engine.batch() as batch:
        pairs = Pairs(engine, batch)
        for seed, policy in enumerate((None, "sink_window", "slow_fast_diverse")):
            session = pairs.join("a b", seed, policy)
            assert session.config.memory == with_policy(SMALL, policy or "slow_fast")
        for _ in range(6):
            pairs.chunk()
        with pytest.raises(ConfigError, match="unknown policy 'other'"):
            batch.join("a", policy="other")


def test_a_rule_of_its_own_does_not_join_captured_graphs(device_engine):
    engine = device_engine(memory=SMALL, max_sessions=2)
    with engine.batch() as batch, pytest.raises(ConfigError, match="'fifo' cannot join a batch of policy 'slow_fast'"):
        batch.join("a", policy="fifo")
    with engine.session("a", policy="fifo") as session:
        assert len(session.next_chunk()) == 9


def test_a_branch_and_a_snapshot_of_a_member(toy_engine):
    engine = toy_engine(memory=SMALL, max_sessions=3)
    with engine.batch(PROMPTS[:2], seeds=SEEDS[:2]) as batch:
        batch.next_chunk()
        with batch.sessions[1].branch() as alone:
            snapshot = alone.snapshot()
            check_same(batch.sessions[1], alone, batch.next_chunk()[1], alone.next_chunk())
        third = batch.join("h")
        third.rewind(snapshot)  # a past of its own for one that joins
        batch.next_chunk()
        torch.testing.assert_close(third.latents, alone.latents, **CLOSE)


def test_members_move_together(toy_engine):
    engine = toy_engine()
    batch = engine.batch(["a", "b"])
    assert [session.seed for session in batch.sessions] == [0, 1] and len(engine._sessions) == 2
    one, two = batch.sessions
    for call in (one.next_chunk, lambda: one.prime(torch.zeros(3, 16, 4, 6))):
        with pytest.raises(ConfigError, match="one of a batch that moves in lock-step; ask Batch.next_chunk"):
            call()
    assert [len(frames) for frames in batch.next_chunk()] == [9, 9]
    one.close()
    assert batch.sessions == [two] and set(engine._sessions) == {two}
    batch.close()
    batch.close()
    assert two.closed and not engine._sessions
    for call in (batch.next_chunk, lambda: batch.join("a")):
        with pytest.raises(CFEngineError, match="batch is closed"):
            call()


def test_bad_batches(toy_engine):
    engine = toy_engine()
    for prompts, seeds in ((["a"], [1, 2]), (["a", "b"], [1])):
        with pytest.raises(ConfigError, match=f"{len(prompts)} prompts"):
            engine.batch(prompts, seeds=seeds)
    with pytest.raises(ConfigError, match="seed is -1"):
        engine.batch(["a"], seeds=[-1])
    with pytest.raises(PromptError):
        engine.batch(["a", " "])
    assert not engine._sessions


@pytest.mark.parametrize("lane", LANES)
def test_who_cannot_join_changes_nothing(request, lane):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=2)
    with engine.batch(["a b"], seeds=[4]) as batch:
        pairs = Pairs(engine, batch)
        pairs.single[batch.sessions[0]] = engine.session("a b", seed=4)
        pairs.chunk()
        pages = engine.pages
        for prompt, seed, error in (("a", 1, CapacityError), (" ", 1, CapacityError), ("a", -1, ConfigError)):
            with pytest.raises(error):
                batch.join(prompt, seed=seed)
        assert engine.pages == pages
        pairs.chunk()
    pairs.single.popitem()[1].close()
    with engine.batch() as batch:
        with pytest.raises(PromptError):
            batch.join(" ")
        assert batch.sessions == [] and engine.pages.in_use == 0


def test_graphs_for_so_many_sessions(device_engine):
    engine = device_engine(memory=SMALL)
    with (
        engine.batch(["a", "b"]) as batch,
        pytest.raises(CapacityError, match="captured for 2 sessions and 2 are open"),
    ):
        batch.join("c")


class Broken(RuntimeError):
    """What a decoder raises."""


@pytest.mark.parametrize("lane", LANES)
def test_a_decoder_that_fails_ends_its_session_alone(request, monkeypatch, lane):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=6)
    with engine.batch() as batch:
        pairs = Pairs(engine, batch)
        first, second, third = (pairs.join(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True))
        pairs.chunk()

        def broken(latents):
            raise Broken("no frames")

        decoders = batch._lane._decoders if lane == "toy_engine" else [each._decoder for each in batch._lane._decode]
        monkeypatch.setattr(decoders[0], "decode" if lane == "toy_engine" else "draw", broken)
        made = batch.next_chunk()
        assert [len(frames) for frames in made] == [0, 12, 12]
        assert first.closed and batch.sessions == [second, third]
        ((session, error),) = batch.faults()
        assert session is first and isinstance(error, FaultError) and isinstance(error.__cause__, Broken)
        assert batch.faults() == []
        monkeypatch.undo()
        pairs.single.pop(first).close()
        for one, frames in zip((second, third), made[1:], strict=True):
            check_same(one, pairs.single[one], frames, pairs.single[one].next_chunk())
        pairs.chunk()


@pytest.mark.parametrize("lane", LANES)
def test_passes_that_fail_end_all(request, monkeypatch, lane):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=3)
    other, batch = engine.session("a", seed=1), engine.batch(["a", "b"])
    batch.next_chunk()

    def broken(*args, **options):
        raise Broken("no pass")

    sessions = batch.sessions
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(engine._scheduler, "denoise", broken)
        batch.next_chunk()
    assert batch.closed and all(session.closed for session in sessions) and batch.faults() == []
    assert engine.pages.reserved == engine.pages.total // 3 and len(other.next_chunk()) == 9


@pytest.mark.parametrize("what", ["join", "snapshot", "rewind"])
def test_a_shared_clean_pass_that_is_cut_short_ends_all(toy_engine, monkeypatch, what):
    """Whoever makes it run: half of the memory of all is written, and nobody shows frames of that."""
    engine = toy_engine(memory=SMALL, max_sessions=3)
    batch = engine.batch(["a", "b"])
    one, two = batch.sessions
    batch.next_chunk()
    snapshot = one.snapshot()
    batch.next_chunk()
    attend, calls = type(two.memory).attend, []

    def broken(self, *args):
        calls.append(None)
        if len(calls) == 3:
            raise Broken("no pass")
        return attend(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(type(two.memory), "attend", broken)
        {"join": lambda: batch.join("c"), "snapshot": one.snapshot, "rewind": lambda: one.rewind(snapshot)}[what]()
    with pytest.raises(CFEngineError, match="cut short .*no pass.* none of them can go on"):
        batch.next_chunk()
    assert batch.closed and two.closed and engine.pages.reserved == 0
    with engine.resume(snapshot) as again:
        assert len(again.next_chunk()) == 12


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("error", [Broken("no pages"), RuntimeError("CUDA error: out of memory")])
def test_a_recache_that_fails_ends_its_session_alone(request, monkeypatch, lane, error):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=6)
    if isinstance(error, RuntimeError):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1))
    with engine.batch() as batch:
        pairs = Pairs(engine, batch)
        first, second = (pairs.join(prompt, seed) for prompt, seed in zip(PROMPTS[:2], SEEDS[:2], strict=True))
        pairs.chunk()

        def broken(*args, **options):
            raise error

        first.set_prompt("x", "recache")
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler, "recache", broken)
            made = batch.next_chunk()
        ((session, told),) = batch.faults()
        assert session is first and first.closed and told.__cause__ is error
        assert isinstance(told, DeviceError) or told.part == "recache"
        pairs.single.pop(first).close()
        check_same(second, pairs.single[second], made[1], pairs.single[second].next_chunk())
        pairs.chunk()


def test_what_is_wrong_with_an_event_is_told_once(toy_engine, monkeypatch):
    engine = toy_engine()
    with engine.batch(["a", "b"]) as batch:
        batch.next_chunk()
        monkeypatch.setattr(engine._prompts, "check", lambda prompt: None)
        batch.sessions[0].push(Prompt("x " * 13))
        engine._prompts.ask((("x " * 13, 1.0),)).exception()  # until it has failed
        with pytest.raises(PromptError, match="13 words"):
            batch.next_chunk()
        assert [len(frames) for frames in batch.next_chunk()] == [12, 12]


def test_one_of_a_batch_that_cannot_rewind_leaves_alone(toy_engine, monkeypatch):
    engine = toy_engine(memory=SMALL)
    with engine.batch(["a", "b"]) as batch:
        batch.next_chunk()
        one, two = batch.sessions
        snapshot = one.snapshot()
        monkeypatch.setattr(batch._lane, "restore", None)
        with pytest.raises(TypeError):
            one.rewind(snapshot)
        assert one.closed and batch.sessions == [two] and [len(frames) for frames in batch.next_chunk()] == [12]
