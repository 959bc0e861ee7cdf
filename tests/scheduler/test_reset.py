"""A new beginning in the middle of a stream: what a new session shows, under numbers that go on."""

from __future__ import annotations

import numpy as np
import pytest

from cfengine import Reset
from cfengine.config import POLICIES, MemoryConfig, with_policy
from cfengine.errors import ConfigError
from cfengine.events import Prompt

pytestmark = pytest.mark.cpu

SMALL = MemoryConfig(slow=3)  # full after four chunks
LANES = ["toy_engine", "device_engine"]


def pixels(frames) -> bytes:
    return b"".join(frame.pixels.tobytes() for frame in frames)


def chunks(session, count: int) -> list[bytes]:
    return [pixels(session.next_chunk()) for _ in range(count)]


def anew(engine, prompt: str, seed: int, count: int = 2) -> list[bytes]:
    """What a new session shows."""
    with engine.session(prompt, seed=seed) as session:
        return chunks(session, count)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("policy", POLICIES)
def test_it_shows_what_a_new_session_shows(request, lane: str, policy: str) -> None:
    """Bit for bit, until the memory is full again; indices, times and numbers go on, and one frame follows nothing."""
    engine = request.getfixturevalue(lane)(memory=with_policy(SMALL, policy))
    expected = anew(engine, "a b", 5, 6)
    with engine.session("a b", seed=5) as session:
        session.next_chunk()
        last = session.next_chunk()[-1]
        assert session.push(Reset()) == 1
        frames = session.next_chunk()
        assert [frame.index for frame in frames] == list(range(last.index + 1, last.index + 10))
        assert frames[0].time == frames[0].index / engine.config.video.fps
        assert [frame.cut for frame in frames] == [True] + [False] * 8
        assert (frames[0].last_event_id, frames[0].applied_at_chunk, frames[0].timings.chunk) == (1, 2, 2)
        assert [receipt.event_id for receipt in frames[0].timings.events] == [1]
        assert frames[0].timings.memory.promotions >= 0 and session.prompt == "a b"
        assert [pixels(frames), *chunks(session, 5)] == expected
        assert not session.next_chunk()[0].cut


@pytest.mark.parametrize("lane", LANES)
def test_a_seed_and_prompts_of_the_same_edge(request, lane: str) -> None:
    engine = request.getfixturevalue(lane)(memory=SMALL)
    with engine.session("a", seed=5) as session:
        session.next_chunk()
        session.set_prompt("x", "blend(4)")
        session.set_prompt("b c", "recache")
        session.push(Reset(np.int64(8)), wait=True)
        assert chunks(session, 2) == anew(engine, "b c", 8) and session.seed == 8
        session.push(Reset(), wait=True)
        session.push(Reset(9), wait=True)
        session.set_prompt("d")
        assert chunks(session, 2) == anew(engine, "d", 9)
        session.push(Reset(), wait=True)
        assert chunks(session, 1) == anew(engine, "d", 9, 1), "the seed stays"


def test_a_blend_is_over_and_one_after_it_begins(toy_engine) -> None:
    engine = toy_engine()
    with engine.session("b", seed=1) as plain:
        plain.set_prompt("c", "blend(2)")
        expected = chunks(plain, 3)
    with engine.session("a", seed=1) as session:
        session.next_chunk()
        session.set_prompt("b", "blend(8)")
        session.next_chunk()
        session.push(Reset())
        session.set_prompt("c", "blend(2)")
        assert chunks(session, 3) == expected


def test_scenes_begin_again(toy_engine) -> None:
    engine = toy_engine(memory=MemoryConfig(policy="relative_window", sink=1, slow=0, fast=5, scenes=True))
    scenes = "a[0.75s#] | b[1.5s] | c"
    with engine.session(scenes, seed=1) as session:
        chunks(session, 4)
        session.push(Reset())
        assert chunks(session, 5) == anew(engine, scenes, 1, 5)


def test_no_text_is_encoded_for_it(toy_engine, monkeypatch) -> None:
    """Also where the cache has let go of it."""
    engine = toy_engine()
    with engine.session("a", seed=1) as session:
        session.next_chunk()
        for name in ("now", "ask"):
            monkeypatch.setattr(engine._prompts, name, None)
        session.push(Reset())
        assert session.next_chunk()[0].last_event_id == 1


@pytest.mark.parametrize("lane", LANES)
def test_one_of_a_batch_begins_anew_alone(request, lane: str) -> None:
    engine = request.getfixturevalue(lane)(memory=SMALL)
    with engine.batch(["a", "b c"], seeds=[4, 5]) as batch, engine.batch(["a", "b c"], seeds=[4, 5]) as plain:
        first = [[pixels(frames) for frames in plain.next_chunk()] for _ in range(6)]
        for _ in range(4):
            batch.next_chunk()
        batch.sessions[0].push(Reset())
        made = [[pixels(frames) for frames in batch.next_chunk()] for _ in range(2)]
    assert [shown[0] for shown in made] == [shown[0] for shown in first[:2]]
    assert [shown[1] for shown in made] == [shown[1] for shown in first[4:]]


@pytest.mark.parametrize("lane", LANES)
def test_a_branch_keeps_the_pages_that_it_shares(request, lane: str) -> None:
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=3)
    with engine.session("a", seed=4) as session, engine.session("a", seed=4) as plain:
        chunks(session, 5)
        chunks(plain, 5)
        with session.branch() as branch:
            session.push(Reset(6))
            expected = chunks(plain, 3)
            plain.close()
            assert chunks(session, 4) == anew(engine, "a", 6, 4) and chunks(branch, 3) == expected


@pytest.mark.parametrize("lane", LANES)
def test_one_that_waits_is_part_of_a_snapshot(request, tmp_path, lane: str) -> None:
    engine = request.getfixturevalue(lane)(memory=SMALL)
    with engine.session("a", seed=3) as session:
        chunks(session, 2)
        session.push(Reset(2**64 - 1))
        session.set_prompt("b", "blend(2)")
        snapshot = session.snapshot()
        expected = chunks(session, 3)
    snapshot.save(tmp_path / "s")
    with engine.resume(type(snapshot).load(tmp_path / "s")) as again:
        assert chunks(again, 3) == expected and again.seed == 2**64 - 1


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, "1"])
def test_a_seed_that_cannot_be_is_said(seed) -> None:
    with pytest.raises(ConfigError, match="seed is"):
        Reset(seed)


def test_waiting_events_are_bounded_in_bytes(toy_engine, monkeypatch) -> None:
    """What is made counts as it is, what is not as much as it can be; the first is taken whatever it needs."""
    from cfengine.scheduler import director

    engine = toy_engine()
    with engine.session("a", seed=1) as session:
        keys = engine.encode_prompt("b c")
        size = director.bytes_of(keys)
        least = session._director._bytes((("b c", 1.0),))
        assert size <= least < 3 * size
        monkeypatch.setattr(director, "WAITING_BYTES", size + 1)
        assert session.push(Prompt("d e", "blend(16)"), wait=True) == 1
        with pytest.raises(Exception, match=r"hold up to [\d,]+ bytes.*this one up to [\d,]+ more.*sets [\d,]+ aside"):
            session.push(Prompt("f"))
        assert session.push(Reset()) == 2, "one that needs nothing of its own is taken"
        session.next_chunk()
        monkeypatch.setattr(director, "WAITING_BYTES", 3 * size)
        assert session.push(Prompt("b c"), wait=True) == 3 and session.push(Prompt("b c")) == 4, "shared: counted once"
