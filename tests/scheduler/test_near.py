"""Passes that read the sink and the nearest slots alone: which slots, what it costs, and that nothing is lost by it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cfengine.bench.work import block_work, sizes
from cfengine.config import POLICIES, PRESETS, MemoryConfig, with_policy
from cfengine.memory.pages import near_slots
from cfengine.memory.policies import Pass
from cfengine.scheduler.sampler import near_share

pytestmark = pytest.mark.cpu

SMALL = MemoryConfig(slow=3)  # 12 slots, full after four chunks; near are 9
LAST = 3  # level of effort


def test_near_is_half_and_never_less_than_the_sink_and_two_chunks() -> None:
    assert {name: (near_slots(preset.memory), preset.memory.slots) for name, preset in PRESETS.items()} == {
        "tiny-world": (12, 21),
        "context-forcing": (12, 21),
        "self-forcing": (12, 21),
        "longlive": (9, 12),
        "infinity-rope": (6, 6),
        "wan2.1-t2v-1.3b": (12, 21),
    }
    assert near_slots(MemoryConfig(sink=12, slow=3)) == 18
    assert near_slots(MemoryConfig(sink=1, slow=0, fast=2, chunk_frames=2)) == 3


@pytest.mark.parametrize("name", PRESETS)
def test_what_it_saves_is_what_the_bench_counts(name: str) -> None:
    """The bench counts the prompt too: with 100 keys less than 1 % of a pass, and 2 % in the small world of 16."""
    config = PRESETS[name]
    keys = min(100, config.model.text_len)
    near, whole = (
        block_work(config, sizes(config, slots=slots, text=keys)).flops
        for slots in (near_slots(config.memory), config.memory.slots)
    )
    assert near_share(config) == pytest.approx(near / whole, rel=0.005)
    assert (near_share(config) == 1.0) == (name == "infinity-rope")


def test_a_memory_that_has_no_more_has_no_such_level(toy_engine) -> None:
    memory = MemoryConfig(policy="relative_window", sink=1, slow=0, fast=5)
    assert toy_engine(memory=memory).session("a").efforts == pytest.approx((1.0, 0.8, 0.6))


class Read:
    """Stands before attention and keeps what it reads: (page_ids, positions) in use, layer after layer."""

    def __init__(self, memory) -> None:
        self.seen: list[tuple[list[int], list[int]]] = []
        self._attention = memory.ops.paged_attention
        memory.ops = dataclasses.replace(memory.ops, paged_attention=self)

    def __call__(self, query, k_pages, v_pages, page_ids, positions, count, q_positions, **options):
        self.seen.append((page_ids[: int(count)].tolist(), positions[: int(count)].tolist()))
        return self._attention(query, k_pages, v_pages, page_ids, positions, count, q_positions, **options)


CUTS = MemoryConfig(policy="relative_window", sink=1, slow=0, fast=14, scenes=True)  # 15 slots, near are 8


RULES = [*(with_policy(dataclasses.replace(SMALL, threshold=1.0), policy) for policy in POLICIES), CUTS]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.policy)
def test_the_slots_that_are_read(toy_engine, rule: MemoryConfig) -> None:
    """Of every pass of every chunk, by the table of its layer: the sink, then the last ones, at their own positions."""
    engine = toy_engine(memory=rule)
    with engine.session("a b[4.5s] | c[1.5s#] | d", seed=3) as session:  # where there are scenes, of 6 and 2 chunks
        memory, read = session.memory, Read(session.memory)
        near, sink, whole = near_slots(rule), rule.kept_sink, []
        for chunk in range(13 if rule.scenes else 7):
            session.effort = LAST
            session.next_chunk()  # the clean pass of the chunk before, then two that look near alone
            stacked = memory.tables.stacked
            layers = len(stacked.count)
            for layer, (ids, positions) in enumerate(read.seen[-layers:]):
                count = int(stacked.count[layer])
                shown = [*range(sink), *range(sink + count - near, count)] if count > near else range(count)
                assert ids == stacked.page_ids[layer, list(shown)].tolist()
                assert positions == stacked.positions[layer, list(shown)].tolist()
                assert set(stacked.page_ids[layer, count - 3 : count].tolist()) <= set(ids)  # the chunk itself
            whole.append(count <= near)
            passes = [len(ids) for ids, _ in read.seen[::layers]]
            full = min(3 * chunk, rule.slots)
            if rule.policy not in ("slow_fast_paper", "slow_fast_diverse") and not rule.scenes:  # which may show fewer
                clean = [full] if chunk else []
                assert passes == [*clean, *[min(3 * chunk + 3, near)] * 2]
            read.seen.clear()
        after = whole[whole.index(False) :]  # a new scene leaves less than the level reads, for a while
        assert any(after) == rule.scenes and not after[-1]


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in ("slow_fast", "uniform")])
def test_coming_back_loses_nothing(toy_engine, policy: str) -> None:
    """A stream at the last level leaves, of its latents, the memory that clean passes over them alone leave, and so its
    clean passes have read all of it. (The two rules that are left out keep pages of denoise passes, at any level.)
    """
    engine = toy_engine(memory=with_policy(SMALL, policy))
    with engine.session("a b", seed=3) as near, engine.session("a b", seed=3) as given:
        near.effort, latents = LAST, []
        for _ in range(7):
            near.next_chunk()
            latents.append(near.latents)
        given.prime(torch.cat(latents))
        near.snapshot()  # runs the clean pass that is due
        ours, theirs = near.memory.tensors(), given.memory.tensors()
        for name in ("positions", "sources", "count", "seen", "last_key", "ends", "promoted"):
            assert torch.equal(ours[name], theirs[name]), name
        for layer, count in enumerate(ours["count"].flatten().tolist()):
            for name in ("k", "v"):
                one, two = (part[name][layer][part["page_ids"][layer, :count].long()] for part in (ours, theirs))
                assert torch.equal(one, two)


@pytest.mark.parametrize("lane", ["toy_engine", "device_engine"])
def test_it_differs_once_there_is_more_than_it_reads(request, lane: str) -> None:
    """Three chunks fill what the last level reads; until then it is the level before, bit for bit."""
    engine = request.getfixturevalue(lane)(memory=SMALL, efforts=True)
    with engine.session("a b", seed=3) as near, engine.session("a b", seed=3) as whole:
        near.effort, whole.effort = LAST, LAST - 1
        same = []
        for _ in range(4):
            pair = near.next_chunk(), whole.next_chunk()
            same.append(torch.equal(near.latents, whole.latents))
            assert [chunk[0].timings.near for chunk in pair] == [True, False]
        assert same == [True, True, True, False]


@pytest.mark.parametrize("lane", ["toy_engine", "device_engine"])
def test_a_batch_reads_what_each_of_its_sessions_reads_alone(request, lane: str) -> None:
    """To within what a batch may differ by, one level in a pixel, far less than the level makes of difference."""
    engine = request.getfixturevalue(lane)(memory=SMALL, efforts=True)
    prompts = ["a b", "c"]
    alone = []
    for seed, prompt in enumerate(prompts):
        with engine.session(prompt, seed=seed) as session:
            session.effort = LAST
            for _ in range(6):
                session.next_chunk()
            alone.append(session.latents)
    with engine.batch(prompts) as batch:
        for session in batch.sessions:
            session.effort = LAST
        for _ in range(6):
            batch.next_chunk()
        for session, expected in zip(batch.sessions, alone, strict=True):
            torch.testing.assert_close(session.latents, expected, atol=1e-4, rtol=0)


def test_it_asks_the_host_for_nothing(toy_engine, no_reads) -> None:
    """What a captured graph holds must read no number of the device and make no tensor of a literal."""
    memory = toy_engine(memory=SMALL).session("a").memory
    table = memory.tables.layers[0]
    table.count.fill_(12)
    with no_reads:
        ids, positions, count = memory._read(table, Pass(0, near=True))
    assert int(count) == ids.shape[0] == positions.shape[0] == 9
    assert memory._read(table, Pass(0))[0] is table.page_ids
