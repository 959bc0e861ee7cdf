"""A fixed budget of pages: who is let in, what branches share, and that nothing is allocated once it is ready."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfengine.config import POLICIES, MemoryConfig, PrecisionConfig, with_policy
from cfengine.errors import CapacityError, ConfigError, DeviceError, PromptError, SnapshotError
from cfengine.memory.budget import Budget, Lease
from cfengine.snapshot import Snapshot

pytestmark = pytest.mark.cpu

SMALL = MemoryConfig(slow=3)  # full after four chunks
LAYERS, PAGES = 2, 12 + 3  # of a session: what slots show and what a pass writes, in each of the toy's layers
PAGE = 6 * 48 * 4 * 2  # bytes: tokens, width, float32, keys and values
LANES = ("toy_engine", "device_engine")


def seen(session) -> tuple:
    """What a consumer gets of a chunk, but for the time that it took."""
    frames = session.next_chunk()
    return (
        frames[0].index, frames[0].timings.memory, frames[0].last_event_id,
        b"".join(frame.pixels.tobytes() for frame in frames), session.latents.numpy().tobytes(),
    )  # fmt: skip


def check_books(engine, sessions) -> None:
    """What the budget counts is what open sessions hold; free pages are held by none, and the zero page is zero."""
    budget = engine._lanes._budget
    held = torch.zeros_like(budget.shares)
    held[:, 0] = 1
    for session in sessions:
        lease = session.memory.lease
        for layer, pages in enumerate(lease.pages[:, 1:].tolist()):
            assert len(set(pages)) == len(pages) == PAGES and 0 not in pages
            held[layer, pages] += 1
        spares = session.memory.tables.stacked.spare_ids.long()
        assert (budget.shares.gather(1, lease.pages.gather(1, spares).long()) == 1).all()  # alone may write them
    assert torch.equal(held, budget.shares)
    count = engine.pages
    assert count.reserved == len(sessions) * LAYERS * PAGES and count.in_use <= count.reserved
    assert not any(part[:, 0].float().any() for part in (budget.pool.k, budget.pool.v))


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


@pytest.mark.parametrize("lane", LANES)
def test_a_session_that_is_dropped_takes_its_pages_along(request, lane):
    """Where there is no budget: nothing of the engine holds them."""
    engine = request.getfixturevalue(lane)(memory=SMALL)
    session = engine.session("a")
    held = weakref.ref(session.memory)
    del session
    gc.collect()
    assert held() is None and not engine._sessions


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
@pytest.mark.parametrize("policy", POLICIES)
def test_pages_of_a_budget_show_what_own_pages_show(request, policy, lane):
    make = request.getfixturevalue(lane)
    plain, engine = (make(memory=with_policy(SMALL, policy), max_sessions=most) for most in (None, 3))
    engine.session("h").close()
    with plain.session("a b", seed=5) as one, engine.session("c") as other, engine.session("a b", seed=5) as two:
        for number in range(6):
            if number == 4:
                one.set_prompt("c", "recache")
                two.set_prompt("c", "recache")
            assert seen(one) == seen(two)
            other.next_chunk()
            check_books(engine, [other, two])


def test_a_session_under_another_rule_is_branched_and_resumed_under_it(toy_engine):
    engine, narrow = toy_engine(memory=SMALL, max_sessions=3), toy_engine(memory=MemoryConfig("fifo", 0, 0, 3))
    with engine.session("a b", seed=5, policy="sink_window") as session:
        for _ in range(4):
            session.next_chunk()
        snapshot = session.snapshot()
        with session.branch() as branch, engine.resume(snapshot) as again:
            assert again.config.memory == branch.config.memory == with_policy(SMALL, "sink_window")
            for _ in range(2):
                assert seen(session) == seen(branch) == seen(again)
        with engine.session("c") as other, pytest.raises(SnapshotError, match="memory.* and this engine has"):
            other.rewind(snapshot)
    with pytest.raises(SnapshotError, match="memory.* and this engine has"):
        narrow.resume(dataclasses.replace(snapshot, made_for=snapshot.made_for | {"memory.policy": "slow_fast"}))


@pytest.mark.parametrize("lane", LANES)
def test_a_branch_takes_pages_as_it_diverges(request, lane):
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=3)
    one = LAYERS * PAGES
    with engine.session("a", seed=1) as session:
        for _ in range(5):
            session.next_chunk()
        with engine.session("b", seed=2) as other:
            places = [session.memory.lease.pages.clone(), other.memory.lease.pages.clone()]
            before = engine.pages
            assert before.in_use == 2 * one
            branch = session.branch()
            after = engine.pages
            assert after.reserved == 3 * one
            assert after.in_use == 2 * one + LAYERS * 3  # what its next pass writes, and no more
            assert torch.equal(session.memory.lease.pages, places[0])  # and no page of others moved
            grown = [after.in_use]
            for number in range(5):
                first = seen(session), seen(branch)
                assert (first[0] == first[1]) == (number < 2)
                grown.append(engine.pages.in_use)
                if number == 1:
                    branch.set_prompt("x y")
            assert grown == sorted(grown) and grown[-1] > grown[0] + LAYERS * 3 and grown[-1] <= 3 * one
            assert torch.equal(other.memory.lease.pages, places[1])
            check_books(engine, [session, other, branch])
            branch.close()
            assert engine.pages.in_use == 2 * one
        check_books(engine, [session])


def test_who_came_from_a_closed_session_keeps_its_pages(toy_engine):
    engine = toy_engine(memory=SMALL, max_sessions=3)
    session = engine.session("a", seed=1)
    for _ in range(5):
        session.next_chunk()
    branch = session.branch()
    third = branch.branch()
    expected = [seen(third) for _ in range(2)]
    session.close()
    with engine.session("b"):  # in place of the first: it may have no page that the branch shows
        check_books(engine, list(engine._sessions))
        third.close()
        assert [seen(branch) for _ in range(2)] == expected
    branch.close()
    assert engine.pages.in_use == 0


class Crowd:
    """Sessions of one engine, opened, branched, rewound and closed by number; `log` is all that is seen of them."""

    def __init__(self, engine, most: int) -> None:
        self.engine, self.most = engine, most
        self.sessions = [engine.session("a b", seed=7)]
        self.kept: list[Snapshot] = []
        self.log: list = []

    def of(self, number: int):
        return self.sessions[number % len(self.sessions)]

    def chunk(self, number: int) -> None:
        self.log.append(seen(self.of(number)))

    def open(self, number: int) -> None:
        if len(self.sessions) < self.most:
            self.sessions.append(self.engine.session("c", seed=number))

    def branch(self, number: int) -> None:
        if len(self.sessions) < self.most:
            self.sessions.append(self.of(number).branch())

    def close(self, number: int) -> None:
        if len(self.sessions) > 1:
            self.sessions.pop(number % len(self.sessions)).close()

    def keep(self, number: int) -> None:
        self.kept.append(self.of(number).snapshot())

    def rewind(self, number: int) -> None:
        if self.kept:
            self.of(number).rewind(self.kept[number % len(self.kept)])

    def recache(self, number: int) -> None:
        self.of(number).set_prompt("d e", "recache")

    def play(self, schedule) -> list:
        for what, number in [("chunk", 0), ("chunk", 0), ("branch", 0), *schedule]:
            getattr(self, what)(number)
            if self.engine.pages is not None:
                check_books(self.engine, self.sessions)
        for number in range(len(self.sessions)):
            self.chunk(number)
        for session in self.sessions:
            session.close()
        return self.log


STEPS = ("chunk", "chunk", "chunk", "branch", "branch", "close", "keep", "rewind", "recache", "open")


def check_schedules(make, config, examples: int) -> None:
    """Sessions that share pages show, bit for bit, what sessions show that copy them."""
    copying, sharing = make(config), make(config, max_sessions=4)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 11)), max_size=16))
    def run(schedule) -> None:
        assert Crowd(sharing, 4).play(schedule) == Crowd(copying, 4).play(schedule)
        assert sharing.pages.in_use == sharing.pages.reserved == 0

    run()


def of_policy(make, policy: str):
    return dataclasses.replace(make().config, memory=with_policy(SMALL, policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_sharing_is_not_seen(toy_engine, policy):
    check_schedules(toy_engine, of_policy(toy_engine, policy), examples=5)


@pytest.mark.parametrize("policy", ["slow_fast", "slow_fast_diverse", "sink_window"])
def test_sharing_is_not_seen_on_the_lane_of_a_gpu(device_engine, policy):
    check_schedules(device_engine, of_policy(device_engine, policy), examples=5)


def test_sharing_of_pages_in_e4m3_is_not_seen(toy_engine):
    config = dataclasses.replace(toy_engine().config, memory=SMALL, precision=PrecisionConfig(pages="fp8"))
    check_schedules(toy_engine, config, examples=5)


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("policy", POLICIES)
def test_sharing_is_not_seen_by_many(request, policy, lane):
    make = request.getfixturevalue(lane)
    check_schedules(make, of_policy(make, policy), examples=25)


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
