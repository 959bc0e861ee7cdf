"""Rules of the memory, against hand-computed tables and against invariants on random schedules."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfengine.config import POLICIES, EngineConfig, MemoryConfig, ModelConfig, VideoConfig, with_policy
from cfengine.errors import ConfigError
from cfengine.kernels.rows import FILL, NONE, ROLL
from cfengine.memory.pages import Tables
from cfengine.memory.policies import Pass, make_policy
from cfengine.ops import select

pytestmark = pytest.mark.cpu

OPS = select("cpu", prefer="reference")
DIM = 4


def setup(memory: MemoryConfig) -> tuple[Tables, object]:
    config = EngineConfig(
        "t", model=ModelConfig(dim=DIM, ffn_dim=4, heads=1, layers=1), memory=memory, video=VideoConfig(16, 16)
    )
    return Tables(config), make_policy(memory, OPS)


def direction(degrees: float) -> torch.Tensor:
    """A key mean at an angle, so that the cosine of two is the cosine of their difference."""
    radians = math.radians(degrees)
    return torch.tensor([math.cos(radians), math.sin(radians), 0.0, 0.0])


def run_chunk(tables, policy, start: int, degrees: float, passes: int = 2) -> list[dict]:
    """Noisy passes far from everything, then a clean one at `degrees`; what the table shows after each."""
    shown = []
    for i in range(passes):
        clean = i == passes - 1
        written = tables.layers[0].spare_ids.tolist()
        policy.update(tables, 0, direction(degrees if clean else 123.0), Pass(start, clean=clean))
        table = tables.layers[0]
        end = int(table.count)
        shown.append(
            {
                "sources": table.sources[:end].tolist(),
                "positions": table.positions[:end].tolist(),
                "q": table.q_positions.tolist(),
                "ids": table.page_ids[:end].tolist(),
                "written": written,
                "action": int(table.decision[3]),
                "sim": float(table.similarity),
            }
        )
    return shown


# cos 10 degrees = 0.985 is above the threshold of 0.95, cos 30 degrees = 0.866 below
PAPER = MemoryConfig(policy="slow_fast_paper", sink=3, slow=2, fast=6, rope_length=11)


def test_paper_rule_by_hand():
    """Two slow slots, chunks of 3. Chunks 1, 3, 7, 9 differ from the chunk before and are marked, chunk 5 is not."""
    tables, policy = setup(PAPER)
    angles = [0, 30, 60, 90, 120, 130, 160, 190, 220, 250]
    seen = [run_chunk(tables, policy, 3 * i, angle)[-1] for i, angle in enumerate(angles)]
    sources = [s["sources"] for s in seen]
    assert sources[0] == [0, 1, 2]
    assert sources[1] == [0, 1, 2, 3, 4, 5]
    assert sources[2] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert sources[3] == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]  # chunk 1 left fast memory: its first frame is slow now
    assert sources[4] == [0, 1, 2, 3, 9, 10, 11, 12, 13, 14]  # chunk 2 is even: dropped whole
    assert sources[5] == [0, 1, 2, 3, 9, 12, 13, 14, 15, 16, 17]  # chunk 3 joins; slow memory is full
    assert sources[7] == [0, 1, 2, 3, 9, 18, 19, 20, 21, 22, 23]  # chunk 5 (130 after 120 degrees) was not novel
    assert sources[9] == [0, 1, 2, 9, 21, 24, 25, 26, 27, 28, 29]  # chunk 7 joins, the oldest slow page goes
    assert [s["action"] for s in seen] == [
        NONE
    ] * 10  # a promotion happens when the next chunk enters, not on its clean pass
    assert seen[5]["sim"] == pytest.approx(math.cos(math.radians(10)), abs=1e-6)
    assert math.isnan(seen[4]["sim"])


def test_paper_rule_positions_by_hand():
    tables, policy = setup(PAPER)
    seen = [run_chunk(tables, policy, 3 * i, 30.0 * i)[-1] for i in range(6)]
    assert [s["q"] for s in seen] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [8, 9, 10], [8, 9, 10], [8, 9, 10]]
    assert seen[2]["positions"] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    # ten pages below an anchor of 10: the sink stays at 0..2, the other seven end at the anchor
    assert seen[3]["positions"] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert seen[5]["positions"] == list(range(11))


def test_paper_rule_promotes_on_entry_and_rolls_when_full():
    tables, policy = setup(PAPER)
    actions = []
    for i in range(10):
        actions.append(run_chunk(tables, policy, 3 * i, 30.0 * i)[0]["action"])
    assert actions == [NONE, NONE, NONE, FILL, NONE, FILL, NONE, ROLL, NONE, ROLL]


def test_paper_rule_keeps_the_clean_page():
    """The page that joins slow memory is the one that the chunk's clean pass wrote."""
    tables, policy = setup(PAPER)
    clean = {}
    for i in range(4):
        shown = run_chunk(tables, policy, 3 * i, 30.0 * i, passes=5)
        clean[3 * i] = shown[-1]["written"][0]
    assert shown[-1]["sources"][3] == 3
    assert shown[-1]["ids"][3] == clean[3]


def test_slow_fast_keeps_the_page_of_the_deciding_pass():
    """The released rule promotes on any pass: the slow copy stays that pass's page, the fast one is written anew."""
    memory = MemoryConfig(policy="slow_fast", sink=3, slow=3, fast=3, rope_length=9)
    tables, policy = setup(memory)
    for i in range(3):
        run_chunk(tables, policy, 3 * i, 123.0)
    first = run_chunk(tables, policy, 9, 0.0)
    assert [s["action"] for s in first] == [NONE, FILL]  # the clean pass differs from the noisy one: promoted there
    assert first[-1]["sources"] == [0, 1, 2, 9, 4, 5, 9, 10, 11]
    assert first[-1]["ids"][3] == first[-1]["ids"][6] == first[-1]["written"][0]
    table = tables.layers[0]
    policy.update(tables, 0, direction(0.0), Pass(9))  # a further pass over the same chunk
    assert int(table.decision[1]) == 1  # already promoted
    assert table.page_ids[3] == first[-1]["written"][0] != table.page_ids[6]


def test_window_policies_by_hand():
    fifo, policy = setup(MemoryConfig(policy="fifo", sink=0, slow=0, fast=6))
    shown = [run_chunk(fifo, policy, 3 * i, 0.0)[-1] for i in range(4)]
    assert shown[3]["sources"] == shown[3]["positions"] == [6, 7, 8, 9, 10, 11]
    assert shown[3]["q"] == [9, 10, 11]
    sink, policy = setup(MemoryConfig(policy="sink_window", sink=3, slow=0, fast=6))
    shown = [run_chunk(sink, policy, 3 * i, 0.0)[-1] for i in range(5)]
    assert shown[4]["sources"] == shown[4]["positions"] == [0, 1, 2, 9, 10, 11, 12, 13, 14]
    relative, policy = setup(MemoryConfig(policy="relative_window", sink=3, slow=0, fast=6))
    shown = [run_chunk(relative, policy, 3 * i, 0.0)[-1] for i in range(5)]
    assert shown[4]["sources"] == [0, 1, 2, 9, 10, 11, 12, 13, 14]
    assert shown[4]["positions"] == list(range(9)) and shown[4]["q"] == [6, 7, 8]


def test_scene_flush_and_cut_by_hand():
    """Infinity-RoPE: a scene keeps the first frame and the last two slots; a cut jumps to positions 45..47."""
    tables, policy = setup(MemoryConfig(policy="relative_window", sink=1, slow=0, fast=8, scenes=True))
    for i in range(4):
        run_chunk(tables, policy, 3 * i, 0.0)
    policy.flush(tables)
    policy.update(tables, 0, direction(0.0), Pass(12, cut=True))
    table = tables.layers[0]
    assert table.sources[:6].tolist() == [0, 10, 11, 12, 13, 14]
    assert table.positions[:6].tolist() == [0, 1, 2, 45, 46, 47]
    assert table.q_positions.tolist() == [45, 46, 47]


@settings(max_examples=120, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    chunk=st.integers(1, 3),
    sink=st.integers(0, 4),
    slow=st.integers(0, 5),
    extra=st.integers(0, 4),
    degrees=st.lists(st.sampled_from([0.0, 5.0, 40.0, 90.0]), min_size=3, max_size=40),
    keep=st.integers(0, 1),
)
def test_tables_stay_sound(policy, chunk, sink, slow, extra, degrees, keep):
    """Pages to write are never shown, the newest chunk is always attended, nothing leaves its range."""
    sink = 0 if policy == "fifo" else sink
    memory = MemoryConfig(
        policy=policy,
        sink=sink,
        slow=slow,
        fast=chunk + extra,
        chunk_frames=chunk,
        keep=keep,
        rope_length=21,
        interval=2,
    )
    tables, rule = setup(memory)
    for i, angle in enumerate(degrees):
        start, clean = (i // 3) * chunk, i % 3 == 2
        written = tables.layers[0].spare_ids.tolist()
        rule.update(tables, 0, direction(angle), Pass(start, clean=clean))
        table = tables.layers[0]
        end, ids = int(table.count), table.page_ids.tolist()
        spare = table.spare_ids.tolist()
        assert chunk <= end <= memory.slots
        assert len(set(spare)) == chunk and not set(spare) & set(ids)
        assert all(0 < page <= memory.slots + chunk for page in spare)
        # LongLive attends to its sink before that is full
        filled = int(tables.ends[0]) if policy == "sink_window" else end
        assert all(0 < page <= memory.slots + chunk for page in ids[:filled])
        sources = table.sources[:filled].tolist()
        assert set(range(start, start + chunk)) <= set(sources)
        if policy not in ("sink_window", "relative_window"):  # which protect their sink from later passes
            assert set(written) <= set(ids)
        if policy == "slow_fast_paper":
            assert len(set(sources)) == end  # disjoint


def test_same_slots_under_every_policy():
    released = MemoryConfig()
    for policy in POLICIES:
        assert with_policy(released, policy).slots == released.slots == 21
    with pytest.raises(ConfigError, match="unknown policy 'lru'.*slow_fast"):
        with_policy(released, "lru")


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="fast memory of 2 frames cannot hold a chunk of 3"):
        MemoryConfig(fast=2)
    with pytest.raises(ConfigError, match="interval"):
        MemoryConfig(policy="uniform")
    with pytest.raises(ConfigError, match="keep is 4"):
        dataclasses.replace(MemoryConfig(), keep=4)
    for bad in ({"sink": -1}, {"slow": -2}, {"rope_length": 0}, {"chunk_frames": 0}):
        ((name, value),) = bad.items()
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            MemoryConfig(**bad)
    with pytest.raises(ConfigError, match="8 slots cannot hold a sink of 3 and a fast memory of 6"):
        MemoryConfig(slots_override=8)


def test_nothing_is_promoted_when_nothing_is_kept():
    tables, policy = setup(MemoryConfig(keep=0, slow=3, fast=3))
    for i in range(6):
        shown = run_chunk(tables, policy, 3 * i, 90.0 * i)
        assert {s["action"] for s in shown} == {NONE}
        assert tables.layers[0].decision[2] == 0  # cannot fill
    assert shown[-1]["sources"][-3:] == [15, 16, 17]
