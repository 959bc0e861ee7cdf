"""Lanes outlive their sessions: nothing is captured twice, and nothing of one session shows in the next."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from cfengine import lanes as lanes_module
from cfengine.config import POLICIES, MemoryConfig, with_policy
from cfengine.errors import DeviceError, PromptError

pytestmark = pytest.mark.cpu

ONE_LANE = ["denoise", "clean", "first", "later"]
PAST = torch.randn(6, 16, 4, 6, generator=torch.Generator().manual_seed(0))


def seen(session, chunks: int = 4) -> list:
    """All that a consumer sees of chunks, but for the clock."""
    shown = []
    for _ in range(chunks):
        frames = session.next_chunk()
        pixels = np.stack([frame.pixels for frame in frames])
        shown.append((frames[0].index, frames[0].timings.memory, pixels.tobytes(), session.latents.numpy().tobytes()))
        assert (frames[0].timings.clean > 0) == (frames[0].timings.chunk > 0)
    return shown


def idle(engine) -> list:
    """Lanes that are kept."""
    return [lane for held in engine._lanes.idle._lanes.values() for lane in held]


def closed_in_the_middle(engine) -> None:
    with engine.session("c d e", seed=9) as session:
        seen(session, 8)


def closed_by_its_consumer(engine) -> None:
    stream = engine.stream("c d e", seed=9)
    for _ in range(12):
        next(stream)
    stream.close()


def primed(engine) -> None:
    with engine.session("c d e", seed=9, latents=PAST) as session:
        seen(session, 2)


def primed_alone(engine) -> None:
    engine.session("c d e", seed=9, latents=PAST).close()


def never_begun(engine) -> None:
    engine.session("c d e", seed=9).close()


def refused(engine) -> None:
    with pytest.raises(PromptError):
        engine.session(" ")


def dropped_by_its_consumer(engine) -> None:
    stream = engine.stream("c d e", seed=9)
    for _ in range(12):
        next(stream)


def closed_before_it_began(engine) -> None:
    stream = engine.stream("c d e", seed=9)
    stream.close()
    assert not engine._sessions and idle(engine)


BEFORE = (
    closed_in_the_middle, closed_by_its_consumer, closed_before_it_began, dropped_by_its_consumer, primed, primed_alone,
    never_begun, refused,
)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "latents", "chunks"), [*((before, None, 2) for before in BEFORE), (closed_in_the_middle, PAST, 7)]
)
def test_a_lane_that_was_used_shows_what_a_new_one_shows(device_engine, before, latents, chunks):
    """Bit for bit; after 7 chunks the memory is full."""
    new, used = device_engine(), device_engine()
    before(used)
    with new.session("a b", seed=5, latents=latents) as expected, used.session("a b", seed=5, latents=latents) as found:
        assert seen(found, chunks) == seen(expected, chunks)
    assert used._runtime.captured == new._runtime.captured == ONE_LANE


@pytest.mark.parametrize("policy", POLICIES)
def test_no_rule_remembers(device_engine, policy):
    engine = device_engine(memory=with_policy(MemoryConfig(slow=3), policy))
    shown = []
    for _ in range(2):
        with engine.session("a b", seed=5) as session:
            shown.append(seen(session, 7))
    assert shown[0] == shown[1] and engine._runtime.captured == ONE_LANE


def test_scenes_begin_anew(device_engine):
    memory = MemoryConfig(policy="relative_window", sink=1, slow=0, fast=5, scenes=True)
    engine = device_engine(memory=memory)
    shown = []
    for _ in range(2):
        with engine.session("a[1.5s#] | b[0.75s] | c", seed=2) as session:
            shown.append(seen(session, 5))  # closed after a cut and a flush
    assert shown[0] == shown[1]


def test_batches_use_the_lanes_of_batches(device_engine):
    engine = device_engine()
    shown = []
    for _ in range(2):
        with engine.batch(["a b", "c"], seeds=[4, 5]) as batch:
            chunks = [batch.next_chunk() for _ in range(3)]
            shown.append(b"".join(frame.pixels.tobytes() for chunk in chunks for part in chunk for frame in part))
    one_batch = [*["denoise", "clean"] * 2, *["first", "later"] * 2]  # passes of two sessions, and of one
    assert shown[0] == shown[1] and engine._runtime.captured == one_batch
    with engine.session("a"):
        assert engine._runtime.captured == one_batch + ONE_LANE
    kinds = {kind for kind, held in engine._lanes.idle._lanes.items() if held}
    assert kinds == {(engine.config.memory, 1), (engine.config.memory, 2)} and not engine._sessions


def test_sessions_at_once_have_lanes_of_their_own_and_one_is_kept(device_engine):
    engine = device_engine()
    one, two = (engine.session("a", seed=seed) for seed in (1, 2))
    lanes = [one._lane, two._lane]
    assert lanes[0] is not lanes[1]
    one.close()
    two.close()
    assert idle(engine) == [lanes[0]] and not lanes[1].memories
    with engine.session("a") as again, engine.session("a") as another:
        assert again._lane is lanes[0] and another._lane not in lanes


def test_who_is_late_to_close_does_not_take_the_lane_of_the_next(device_engine):
    """A consumer in a cycle of references counts as dropped before what it is in the middle of is closed."""
    engine = device_engine()
    late = engine.session("a")
    lane = late._lane
    engine._lanes._lent[lane] = lambda: None  # as the garbage collector leaves it
    with engine.session("b") as other:
        assert other._lane is lane
        late.close()
        assert idle(engine) == [] and other.next_chunk()
        with engine.session("c") as third:
            assert third._lane is not lane


def test_a_closed_session_holds_nothing_of_its_engine(device_engine):
    engine = device_engine()
    stream = engine.stream("a", num_frames=9)
    list(stream)
    held = weakref.ref(engine.model)
    engine.close()
    del engine
    gc.collect()
    assert held() is None and next(stream, None) is None


def test_an_idle_lane_holds_no_prompt(device_engine):
    engine = device_engine()
    with engine.session("a") as session:
        session.next_chunk()
        prompts = session._lane._program.prompts
        assert prompts[0]._held is session._director.keys
    assert prompts[0]._held is None


def test_a_lane_that_failed_is_not_kept(device_engine, monkeypatch):
    engine = device_engine()
    session = engine.session("a")
    lane = session._lane

    def lost(*args):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(lane, "_launch", lost)
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        session.next_chunk()
    assert session.closed and not lane.memories and not idle(engine)


def test_a_gpu_lost_between_chunks_is_found_by_the_next_session(device_engine, monkeypatch):
    """The clean pass of the last chunk failed: the session has closed well, and its lane is not kept."""
    engine = device_engine()
    session = engine.session("a")

    def lost():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(engine._runtime.compute, "synchronize", lost)
    session.close()
    assert not idle(engine)
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        engine.session("a")
    assert not engine._sessions


def test_idle_lanes_make_room(device_engine, monkeypatch):
    """A new size of batch is told that memory is short, until what lies idle is let go."""
    engine = device_engine()
    engine.session("a").close()
    (left,) = idle(engine)

    def full(what, *args):
        if left.memories:
            raise DeviceError(f"{what} needs 4 GiB")

    monkeypatch.setattr(lanes_module, "check_fits", full)
    with engine.batch(["a", "b"]):
        assert not left.memories and not idle(engine)

    def too_full(what, *args):
        raise DeviceError(f"{what} needs 4 GiB")

    monkeypatch.setattr(lanes_module, "check_fits", too_full)
    with pytest.raises(DeviceError, match="memory of 3 new session.s. needs 4 GiB"):
        engine.batch(["a", "b", "c"])
    assert not idle(engine) and not engine._sessions


def test_noise_of_a_session_on_a_lane_that_was_used_is_drawn_while_it_opens(device_engine):
    engine = device_engine()
    engine.session("a", seed=1).close()
    with engine.session("a", seed=7) as session:
        assert session._lane._noise._drawn == [(7, 0)]


def test_closing_an_engine_lets_all_go(device_engine):
    engine = device_engine()
    session, other = engine.session("a"), engine.session("b")
    lanes = [session._lane, other._lane]
    session.close()
    engine.close()
    assert other.closed and not any(lane.memories for lane in lanes) and not idle(engine)
