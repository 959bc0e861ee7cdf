"""A fixed budget of pages: who is let in, and that nothing is allocated once it is ready."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from cfengine.errors import CapacityError, ConfigError, DeviceError, PromptError
from cfengine.memory.budget import Budget, Lease
from tests.scheduler.books import LANES, LAYERS, PAGE, PAGES, SMALL, check_books

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("lane", LANES)
def test_one_too_many_is_told_the_bytes(request, lane):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=2)
    total, one = 2 * LAYERS * PAGES, LAYERS * PAGES * PAGE
    assert engine.pages == (total, 0, 0, PAGE) and engine.pages.free == total and engine.pages.bytes == 2 * one
    with engine.session("a") as session, engine.session("b"):
        assert engine.pages == (total, total, total, PAGE) and engine.pages.free == 0
        words = f"needs {one} bytes of pages and 0 of {2 * one} are free: 2 of 2 sessions are open.*max_sessions=3"
        for call in (lambda: engine.session("c"), session.branch, lambda: engine.resume(session.snapshot())):
            with pytest.raises(CapacityError, match=words) as caught:
                call()
            assert (caught.value.needed, caught.value.free, caught.value.budget) == (one, 0, 2 * one)
        assert len(session.next_chunk()) == 9 and session.memory.bytes == one
    assert engine.pages == (total, 0, 0, PAGE) and not engine._sessions


def test_bad_budgets(toy_engine):
    for bad in (0, -1, 1.5, "2"):
        with pytest.raises(ConfigError, match="max_sessions is"):
            toy_engine(max_sessions=bad)
    assert toy_engine().pages is None


@pytest.mark.parametrize("lane", LANES)
def test_who_is_refused_or_fails_gives_back_what_it_took(request, monkeypatch, lane):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=1)
    for _ in range(3):
        with pytest.raises(PromptError):
            engine.session(" ")
        with pytest.raises(ConfigError, match="multiple of 3"):
            engine.session("a", latents=torch.zeros(4, 16, 4, 6))
    session = engine.session("a")

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine._scheduler, "denoise", interrupted)
        session.next_chunk()
    assert session.closed and engine.pages.reserved == engine.pages.in_use == 0
    if lane == "toy_engine":  # on a GPU its lane is lost with it, and another is captured
        assert engine._lanes._seats[0].memory.taken is False
    with engine.session("a") as again:
        assert len(again.next_chunk()) == 9


def test_a_session_that_is_dropped_makes_room(toy_engine):
    engine = toy_engine(memory=SMALL, max_sessions=1)
    session = engine.session("a")
    session.next_chunk()
    with pytest.raises(CapacityError):
        engine.session("b")
    del session
    engine.session("b").close()
    assert engine.pages.in_use == 0


@pytest.mark.parametrize("lane", LANES)
def test_a_batch_that_is_dropped_makes_room(request, lane):
    """It and its sessions hold one another, so nothing but a collection finds them."""
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=1)
    engine.batch(["a"]).next_chunk()
    engine.session("b").close()
    for _ in range(20):
        engine.batch()
        gc.collect()
    engine.batch().close()
    assert engine.pages.in_use == 0 and len(engine._lanes._lent) <= 1


def test_a_lane_that_fails_gives_back_its_pages_in_the_order_of_the_passes(device_engine, monkeypatch):
    """On the stream of the passes: the next session looks there for pages that are free."""
    engine, on, closed = device_engine(memory=SMALL, max_sessions=1), [None], []
    runtime, close = engine._runtime, Lease.close
    held = runtime.on

    @contextmanager
    def queued(stream):
        with held(stream):
            on.append(stream)
            yield
            on.pop()

    monkeypatch.setattr(runtime, "on", queued)
    monkeypatch.setattr(Lease, "close", lambda self: closed.append(on[-1]) or close(self))
    session = engine.session("a")
    session._lane._noise = None
    with pytest.raises(AttributeError):
        session.next_chunk()
    assert session.closed and closed and set(closed) == {runtime.compute}


def test_dropped_batches_share_their_graphs(device_engine):
    engine = device_engine(memory=SMALL, max_sessions=2)
    engine.batch(["a"]).next_chunk()
    captured = len(engine._runtime.captured)
    engine.batch(["b"]).close()
    assert len(engine._runtime.captured) == captured


@pytest.mark.parametrize("lane", LANES)
def test_a_closed_engine_lets_go_of_what_was_dropped(request, lane):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=1)
    engine.session("a").next_chunk()
    held = weakref.ref(engine.model)
    engine.close()
    gc.collect()
    assert held() is None


def test_a_budget_that_no_machine_has_is_a_sentence(toy_engine):
    with pytest.raises(DeviceError, match="this machine is out of memory"):
        toy_engine(memory=SMALL, max_sessions=10**10)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("where", ["found", "_count"])
def test_who_finds_no_memory_while_it_opens_takes_none(request, monkeypatch, lane, where):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=1)
    owner = Budget if where == "found" else Lease

    def full(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises((MemoryError, DeviceError)):
        patch.setattr(owner, where, full)
        engine.session("a")
    with engine.session("a") as session:
        session.next_chunk()
        check_books(engine, [session])


@pytest.mark.parametrize("lane", LANES)
def test_a_snapshot_shows_nothing_of_who_was_there_before(request, lane):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=1)

    def kept() -> torch.Tensor:
        with engine.session("a", seed=1) as session:
            session.next_chunk()
            return session.snapshot().tensors["kept.latents"]

    first = kept()
    with engine.session("b", seed=2) as other:
        for _ in range(4):
            other.next_chunk()
    assert torch.equal(kept(), first)


def test_a_session_that_is_dropped_takes_its_pages_along(toy_engine):
    """Where there is no budget: nothing of the engine holds them."""
    engine = toy_engine(memory=SMALL)
    session = engine.session("a")
    held = weakref.ref(session.memory)
    del session
    gc.collect()
    assert held() is None and not engine._sessions


def test_sessions_that_are_dropped_leave_one_lane_to_the_next(device_engine):
    """On a GPU, where it took seconds to capture; what is too many goes when the next one opens."""
    engine = device_engine(memory=SMALL)
    sessions = [engine.session("a") for _ in range(3)]
    held = [weakref.ref(session.memory) for session in sessions]
    captured = list(engine._runtime.captured)
    del sessions
    gc.collect()
    assert not engine._sessions
    with engine.session("b") as session:
        gc.collect()
        assert [memory() for memory in held if memory() is not None] == [session.memory]
        assert engine._runtime.captured == captured


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("most", [None, 2])
def test_a_closed_engine_lets_go_of_pages_and_weights(request, lane, most):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=most)
    session, batch = engine.session("a"), engine.batch(["b"])
    batch.next_chunk()
    held = weakref.ref(engine.model), weakref.ref(session.memory)
    engine.close()
    assert session.closed and batch.closed
    gc.collect()
    assert [found() for found in held] == [None, None]


@pytest.mark.parametrize("lane", LANES)
def test_nothing_is_allocated_once_it_is_ready(request, lane):
    """Fifty sessions, alone and in batches, with branches and without: tensors stay where they were."""
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=3)
    lanes = engine._lanes
    memories = [seat.memory for seat in lanes._seats] or [
        m for each in lanes.idle._lanes.values() for x in each for m in x.memories
    ]
    budget = lanes._budget

    def places() -> list[int]:
        tables = [part for memory in memories for part in (*memory.tables.tensors().values(), memory.lease.pages)]
        return [part.data_ptr() for part in (*budget.pool.tensors().values(), budget.shares, *tables)]

    assert len(memories) == 3
    before, size, count = places(), budget.pool.bytes, engine.pages
    for number in range(25):
        with engine.session("a b", seed=number) as one, engine.session("c", seed=number) as two:
            assert lane == "device_engine" or {id(one.memory), id(two.memory)} <= set(map(id, memories))
            one.next_chunk()
            if number % 5 == 0:
                with two.branch() as third:
                    third.next_chunk()
    if lane == "toy_engine":
        with engine.batch(["a", "b", "c"]) as batch:
            batch.next_chunk()
            assert {id(session.memory) for session in batch.sessions} == set(map(id, memories))
    assert places() == before and budget.pool.bytes == size and engine.pages == count and count.in_use == 0


def test_graphs_are_captured_when_an_engine_is_ready(device_engine):
    engine = device_engine(memory=SMALL, max_sessions=2)
    captured = list(engine._runtime.captured)
    assert captured == ["denoise", "clean", "first", "later"] * 2
    with engine.session("a") as one, engine.session("b") as two:
        one.next_chunk()
        two.next_chunk()
    with engine.session("c") as again:
        again.next_chunk()
        assert engine._runtime.captured == captured


def test_no_host_takes_part_in_sharing(toy_engine, no_reads):
    """Who writes a shared page gets one of its own without a word to the host, as a captured graph needs it."""
    engine = toy_engine(memory=SMALL, max_sessions=2)
    with engine.session("a") as session:
        for _ in range(5):
            session.next_chunk()
        with session.branch() as branch, no_reads:
            branch.memory.own(branch.memory.tables.stacked.page_ids[:, -3:])
            branch.memory.own()
            branch.memory.places(0, branch.memory.tables.layers[0].page_ids)
        assert engine.pages.in_use == LAYERS * PAGES
