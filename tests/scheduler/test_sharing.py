"""Pages that sessions of a budget share: what branches take, and that nobody sees it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfengine.config import POLICIES, MemoryConfig, PrecisionConfig, with_policy
from cfengine.errors import SnapshotError
from cfengine.snapshot import Snapshot
from tests.scheduler.books import LANES, LAYERS, PAGES, SMALL, check_books, seen

pytestmark = pytest.mark.cpu


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
