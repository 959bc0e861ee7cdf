"""Policy `slow_fast_diverse`: the paper's rule until slow memory is full, then the older of the likest pair leaves."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig, with_policy
from cfengine.memory.memory import Memory
from cfengine.memory.pages import Tables
from cfengine.memory.policies import Pass, make_policy
from cfengine.ops import select

pytestmark = pytest.mark.cpu

OPS = select("cpu", prefer="reference")
DIM = 8
# chunks of one frame without a sink: frames 1, 3, 5, ... are compared with the one before
TOY = MemoryConfig("slow_fast_diverse", sink=0, slow=3, fast=1, chunk_frames=1, rope_length=4)


def config(memory: MemoryConfig) -> EngineConfig:
    model = ModelConfig(dim=DIM, ffn_dim=4, heads=1, layers=1)
    return EngineConfig("t", model=model, memory=memory, video=VideoConfig(16, 16))


def setup(memory: MemoryConfig):
    return Tables(config(memory)), make_policy(memory, OPS)


def at(degrees: float) -> torch.Tensor:
    """A key mean at an angle; the eighth axis is the background that separates views."""
    key = torch.zeros(DIM)
    key[0], key[1] = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return key


BACKGROUND = torch.eye(DIM)[7]


def visit(memory: MemoryConfig, views: list[float]) -> list[list[int]]:
    """Frame 2i is background, frame 2i + 1 shows views[i]; the frames in slow memory one chunk after each view."""
    tables, rule = setup(memory)
    shown = []
    for frame in range(2 * len(views) + 1):
        key = at(views[frame // 2]) if frame % 2 else BACKGROUND
        for clean in (False, True):
            rule.update(tables, 0, key if clean else at(123.0), Pass(frame, clean=clean))
        if frame and frame % 2 == 0:
            shown.append(tables.layers[0].sources[: int(tables.layers[0].promoted)].tolist())
    return shown


@pytest.mark.parametrize(
    ("views", "slow"),
    [
        ([0, 90, 180, 0], [3, 5, 7]),  # A B C A: the new A for the old one, here also the oldest
        ([0, 90, 180, 90], [1, 5, 7]),  # A B C B: the oldest stays
        ([0, 90, 180, 180], [1, 3, 7]),
        ([0, 90, 100, 200], [1, 5, 7]),  # all distinct: 90 and 100 degrees are nearest, the older goes
        ([0, 90, 180, 170], [1, 3, 7]),  # the page that joins is nearest to the newest
        ([0, 90, 180, 270], [3, 5, 7]),  # three equal pairs of neighbours: the oldest page goes
        ([0, 0, 90, 90], [3, 5, 7]),  # two pairs of copies: the oldest page goes
        ([0, 90, 90, 0], [3, 5, 7]),  # the same; the older page decides, not the pair's younger
    ],
)
def test_what_leaves_a_full_memory(views, slow):
    shown = visit(TOY, views)
    assert shown[:3] == [[1], [1, 3], [1, 3, 5]]
    assert shown[3] == slow


def test_views_that_return_keep_the_others():
    """A and B in turn for long after C was seen once: the paper's rule has lost C, this one holds it."""
    views = [0.0, 180.0, 90.0] + [90.0, 0.0] * 5
    assert visit(TOY, views)[-1] == [3, 23, 25]
    assert visit(dataclasses.replace(TOY, policy="slow_fast_paper"), views)[-1] == [21, 23, 25]


@pytest.mark.parametrize("slow", [0, 1])
def test_a_memory_of_one_page_is_the_papers(slow):
    memory = dataclasses.replace(TOY, slow=slow)
    views = [0.0, 90.0, 0.0, 180.0]
    assert visit(memory, views) == visit(dataclasses.replace(memory, policy="slow_fast_paper"), views)


def drive(memory: MemoryConfig, chunks: int, seed: int):
    """Yield (tables, pages written) of every pass over chunks whose clean keys are all new."""
    tables, rule = setup(memory)
    generator = torch.Generator().manual_seed(seed)
    for chunk in range(chunks):
        for clean in (False, False, True):
            written = tables.layers[0].spare_ids.tolist()
            key = torch.randn(DIM, generator=generator)
            rule.update(tables, 0, key, Pass(chunk * memory.chunk_frames, clean=clean))
            yield tables, written


SIZES = [
    MemoryConfig("slow_fast_diverse"),
    MemoryConfig("slow_fast_diverse", slow=4, rope_length=13),
    MemoryConfig("slow_fast_diverse", sink=4, slow=3, fast=5, rope_length=12),
    MemoryConfig("slow_fast_diverse", sink=1, slow=5, fast=4, chunk_frames=2, rope_length=10),
]


@pytest.mark.parametrize("memory", SIZES)
def test_the_papers_rule_but_for_what_leaves(memory):
    """Equal in everything until a page leaves a full slow memory; positions, counts and decisions equal for ever."""
    paper = dataclasses.replace(memory, policy="slow_fast_paper")
    left = differ = 0
    for (ours, _), (theirs, _) in zip(drive(memory, 60, 3), drive(paper, 60, 3), strict=True):
        left += int(theirs.stacked.decision[0, 3]) == 2
        for name in ours.stacked._fields:
            mine, other = getattr(ours.stacked, name), getattr(theirs.stacked, name)
            if left and name in ("page_ids", "sources", "spare_ids"):
                differ += name == "sources" and not torch.equal(mine, other)
            else:
                assert torch.equal(mine, other) or (mine.isnan() & other.isnan()).all(), name
        assert torch.equal(ours.marked, theirs.marked)
    assert left > 3 and differ  # the plan exercises the rule


@pytest.mark.parametrize("memory", SIZES)
def test_pages_stay_and_their_order_is_that_of_age(memory):
    """A page shows one frame for as long as it is in slow memory, with the descriptor of its clean pass."""
    holds: dict[int, int] = {}
    for tables, written in drive(memory, 60, 5):
        table = tables.layers[0]
        end, slow = int(table.count), int(table.promoted)
        ids, sources = table.page_ids[:end].tolist(), table.sources[:end].tolist()
        for page, source in zip(ids, sources, strict=True):
            assert page in written or holds[page] == source
        holds = dict(zip(ids, sources, strict=True))
        assert sources == sorted(set(sources))  # disjoint, oldest first
        assert table.positions[:end].max() < memory.rope_length and table.q_positions.max() < memory.rope_length
        assert not set(table.spare_ids.tolist()) & set(ids)
        described = tables.descriptors[0, table.page_ids[memory.sink : memory.sink + slow].long()]
        assert described.norm(dim=1).gt(0).all()


def test_only_this_policy_holds_descriptors():
    for policy, pages in (("slow_fast_diverse", 25), ("slow_fast_paper", 0), ("fifo", 0)):
        assert Tables(config(with_policy(MemoryConfig(), policy))).descriptors.shape == (1, pages, DIM)


def test_reset_forgets_and_load_takes_over():
    memory = SIZES[1]
    *_, (tables, _) = drive(memory, 20, 0)
    fresh = Tables(config(memory))
    one, two = (Memory(config(memory), OPS, torch.float32) for _ in range(2))
    one.tables = tables
    two.load(one.tensors())
    assert tables.descriptors.any() and torch.equal(two.tables.descriptors, tables.descriptors)
    tables.reset()
    pairs = zip(tables.tensors().values(), fresh.tensors().values(), strict=True)
    assert all(torch.equal(mine, other) or mine.isnan().all() for mine, other in pairs)


def test_a_promotion_is_one_page():
    assert Memory(config(MemoryConfig("slow_fast_diverse", keep=3)), OPS, torch.float32).keep == 1


def test_a_stream_of_a_small_memory(toy_engine):
    """From a prompt to frames, over a slow memory that fills in four chunks; every chunk counts as novel."""
    memory = MemoryConfig("slow_fast_diverse", slow=2, rope_length=11, threshold=1.1)
    engine = toy_engine(memory=memory)
    with engine.session("a b", seed=1) as session:
        frames = list(itertools.islice(session.frames(), 9 + 12 * 11))
        tables = session.memory.tables
        assert int(tables.stacked.promoted.min()) == 2 and tables.descriptors.any()
        assert int(session.memory.promotions) > 2 * 2  # two layers or more, each has let pages go
        assert torch.isfinite(session.latents).all()
    assert len(frames) == 141
