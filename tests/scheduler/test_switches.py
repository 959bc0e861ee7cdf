"""Switches from one prompt to another: what chunks read, and what becomes of the memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cfengine.config import POLICIES, MemoryConfig, with_policy
from cfengine.errors import ConfigError
from cfengine.memory.kept import KeptLatents
from cfengine.memory.memory import Shown
from cfengine.scheduler.prompts import mixed, mixed_rows, pure

pytestmark = pytest.mark.cpu

WINDOWS = ("fifo", "sink_window", "relative_window")
# float32; padded keys of weight zero change the order of a softmax's sums, over four passes and two blocks
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def shown(frames) -> bytes:
    return b"".join(frame.pixels.tobytes() for frame in frames)


def test_a_blend_goes_from_row_to_row(toy_engine):
    """Each chunk reads the mixed rows, padded with zeros, and the last the new prompt itself."""
    engine = toy_engine()
    old, new = engine.text.encode("a b c"), engine.text.encode("d")
    with engine.session("a b c", seed=1) as session:
        session.next_chunk()
        session.set_prompt("d", "blend(4)")
        session._director.edge()
        read = [session._director.take()[0] for _ in range(5)]
    for i, keys in enumerate(read[:3], 1):
        rows = (1 - i / 4) * old
        rows[:1] += i / 4 * new
        for found, wanted in zip(keys, engine.model.project_text(rows), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # float32, other order of a sum
    assert read[3] is read[4] is engine.encode_prompt("d")


def test_a_blend_may_be_overtaken_by_another(toy_engine):
    """It begins where the first had come to; weights add up."""
    with toy_engine().session("a", seed=1) as session:
        session.set_prompt("b", "blend(2)")
        session.next_chunk()
        session.set_prompt("c", "blend(4)")
        session._director.edge()
        mixes = session._director._script.mixes(1)
    # without the event chunk 1 would show b alone
    assert mixes == [(("b", 0.75), ("c", 0.25)), (("b", 0.5), ("c", 0.5)), (("b", 0.25), ("c", 0.75)), pure("c")]
    assert mixed(mixed(pure("a"), "b", 0.5), "a", 0.5) == (("a", 0.75), ("b", 0.25))
    assert mixed(pure("a"), "a", 0.5) == pure("a")
    rows = torch.randn(3, 4)
    assert mixed_rows([(rows, 1.0)]) is rows


@pytest.mark.parametrize("policy", POLICIES)
def test_a_blend_of_one_chunk_is_a_cross_switch(toy_engine, policy):
    engine = toy_engine(memory=with_policy(MemoryConfig(slow=3), policy))
    with engine.session("a", seed=1) as one, engine.session("a", seed=1) as two:
        for session, switch in ((one, "blend(1)"), (two, "cross")):
            session.next_chunk()
            session.set_prompt("b c", switch)
        assert shown(one.next_chunk()) == shown(two.next_chunk())


@pytest.mark.parametrize("policy", WINDOWS)
def test_a_flush_before_there_is_anything_forgets_nothing(toy_engine, policy):
    """Nor does it show pages that nothing has written."""
    engine = toy_engine(memory=with_policy(MemoryConfig(sink=3, slow=0, fast=9), policy))
    with engine.session("a", seed=1) as session, engine.session("a", seed=1) as plain:
        session.set_prompt("b", "flush")
        plain.set_prompt("b")
        for _ in range(2):
            assert shown(session.next_chunk()) == shown(plain.next_chunk())
    memory = MemoryConfig(policy=policy, sink=1, slow=0, fast=5, chunk_frames=1)
    with toy_engine(memory=memory).session("a", seed=1) as session:
        session.next_chunk()
        session.set_prompt("b", "flush")
        session.next_chunk()
        assert session.memory.tables.stacked.sources[:, :2].tolist() == [[0, 1]] * 2
        assert session.memory.tables.stacked.count.tolist() == [[2]] * 2


@pytest.mark.parametrize("policy", WINDOWS)
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_flush_leaves_the_first_frame_and_the_last_two(toy_engine, policy, chunks):
    """Also where the window is not full yet."""
    engine = toy_engine(memory=with_policy(MemoryConfig(sink=3, slow=0, fast=9), policy))
    with engine.session("a", seed=1) as session:
        for _ in range(chunks):
            session.next_chunk()
        session.set_prompt("b", "flush")
        session.next_chunk()
        stacked, last = session.memory.tables.stacked, 3 * chunks
        for sources, count in zip(stacked.sources.tolist(), stacked.count.flatten().tolist(), strict=True):
            assert sources[:count] == [0, last - 2, last - 1, last, last + 1, last + 2]


def test_a_sink_that_a_flush_cannot_fill_is_refused(toy_engine):
    engine = toy_engine(memory=MemoryConfig("sink_window", sink=6, slow=0, fast=6))
    with engine.session("a") as session, pytest.raises(ConfigError, match="flush"):
        session.set_prompt("b", "flush")


def pages(session) -> list[torch.Tensor]:
    """Keys and values that slots show, layer by layer, and the tables."""
    session._lane._pay()
    memory = session.memory
    parts = []
    for layer, table in enumerate(memory.tables.layers):
        ids = table.page_ids[: int(table.count)].long()
        told = (tensor.clone() for tensor in (table.sources, table.positions, table.last_key))
        parts += [memory.pool.k[layer][ids], memory.pool.v[layer][ids], *told]
    return parts


@pytest.mark.parametrize("policy", POLICIES)
def test_recaching_is_having_had_the_prompt_from_the_start(toy_engine, policy):
    """While nothing has left fast memory pages and tables are those of the new prompt, bit for bit."""
    rule = {} if policy in WINDOWS else {"slow": 6, "fast": 12, "threshold": -1.0, "interval": 60}  # none is promoted
    engine = toy_engine(memory=dataclasses.replace(with_policy(MemoryConfig(), policy), **rule))
    past = torch.randn(12, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    with engine.session("c d", seed=5, latents=past) as plain, engine.session("a b", seed=5, latents=past) as session:
        differ = [not torch.equal(*pair) for pair in zip(pages(session), pages(plain), strict=True)]
        assert any(differ)
        session.set_prompt("c d", "recache")
        session._director.edge()
        assert session._step().recache
        kept = session._lane._kept[0]
        assert engine._scheduler.recache(session.memory, engine.encode_prompt("c d"), kept) == 4  # passes
        assert all(torch.equal(*pair) for pair in zip(pages(session), pages(plain), strict=True))
        if policy == "slow_fast_diverse":
            assert torch.equal(*(each.memory.tables.descriptors[:, 1:13] for each in (session, plain)))


@pytest.mark.parametrize("policy", POLICIES)
def test_recaching_in_a_full_memory(toy_engine, policy):
    """Tables stay, every page that is shown is new, twice the same, and a stream goes on; layers may differ."""
    engine = toy_engine(memory=with_policy(MemoryConfig(slow=3), policy))
    streams = []
    for switch in ("cross", "recache", "recache"):
        with engine.session("a b", seed=2) as session:
            for _ in range(9):
                session.next_chunk()
            before = pages(session)
            session.set_prompt("c d e", switch)
            frames = session.next_chunk()
            assert (frames[0].timings.recache > 0) == (switch == "recache")
            streams.append(shown(frames) + shown(session.next_chunk()))
            assert torch.isfinite(session.latents).all()
    assert streams[0] != streams[1] == streams[2]
    with engine.session("a b", seed=2) as session:
        for _ in range(9):
            session.next_chunk()
        session._lane._pay()
        engine._scheduler.recache(session.memory, engine.encode_prompt("c d e"), session._lane._kept[0])
        for number, (old, new) in enumerate(zip(before, pages(session), strict=True)):
            if number % 5 in (2, 3):
                assert torch.equal(old, new)  # tables
            elif number % 5 < 2 and number > 4:  # the first layer's keys and values come before any cross-attention
                assert not any(torch.equal(*pair) for pair in zip(old, new, strict=True))


def test_a_frame_in_two_slots_has_one_page_after_recaching(toy_engine):
    """The released rule keeps the deciding pass's noisy page in slow memory; recached, it is the clean one."""
    engine = toy_engine(memory=with_policy(MemoryConfig(), "uniform"))
    with engine.session("a", seed=1) as session:
        for _ in range(8):
            session.next_chunk()
        session._lane._pay()
        engine._scheduler.recache(session.memory, engine.encode_prompt("b"), session._lane._kept[0])
        twice = 0
        for table in session.memory.tables.layers:
            sources, ids = table.sources.tolist(), table.page_ids.tolist()
            pairs = {(source, page) for source, page in zip(sources, ids, strict=True)}
            assert len(pairs) == len(set(sources))
            twice += len(sources) - len(set(sources))
        assert twice > 0
        session.next_chunk()


@pytest.mark.parametrize(
    ("policy", "switch"),
    [
        *((policy, switch) for policy in ("slow_fast", "slow_fast_diverse") for switch in ("recache", "blend(3)")),
        *(("sink_window", switch) for switch in ("flush", "recache", "blend(3)")),  # only windows can be flushed
    ],
)
def test_switches_on_the_lane_of_a_gpu(toy_engine, device_session, policy, switch):
    engine = toy_engine(memory=with_policy(MemoryConfig(slow=3), policy))
    with engine.session("a b", seed=5) as plain, device_session(engine, "a b", 5) as session:
        for number in range(8):
            if number == 5:
                plain.set_prompt("c d e", switch)
                session.set_prompt("c d e", switch)
            ours, theirs = session.next_chunk(), plain.next_chunk()
            torch.testing.assert_close(session.latents, plain.latents, **CLOSE)
            assert (ours[0].timings.recache > 0) == (switch == "recache" and number == 5)
            assert ours[0].last_event_id == theirs[0].last_event_id == int(number > 4)
            assert ours[0].timings.memory == theirs[0].timings.memory


def test_one_of_a_batch_is_recached(toy_engine):
    engine = toy_engine(memory=with_policy(MemoryConfig(slow=3), "slow_fast_paper"))
    with engine.batch(["a", "b c"], seeds=[4, 5]) as batch, engine.session("b c", seed=5) as alone:
        for number in range(7):
            if number == 4:
                batch.sessions[1].set_prompt("d", "recache")
                alone.set_prompt("d", "recache")
            batch.next_chunk()
            alone.next_chunk()
            torch.testing.assert_close(batch.sessions[1].latents, alone.latents, **CLOSE)


def test_kept_latents_stay_in_their_places(toy_engine):
    """Of more chunks than there is room for, the one that the fewest layers show goes, the oldest of these first."""
    engine = toy_engine(memory=MemoryConfig(sink=3, slow=0, fast=3, slots_override=6))
    kept = KeptLatents(engine.config)
    place = kept.latents.data_ptr()

    def seen(*layers: tuple[int, ...]) -> Shown:
        sources = torch.full((2, 6), -1, dtype=torch.int32)
        counts = torch.tensor([[len(row)] for row in layers], dtype=torch.int32)
        for row, values in zip(sources, layers, strict=True):
            row[: len(values)] = torch.tensor(values, dtype=torch.int32)
        return Shown(torch.tensor(0), sources, counts)

    assert seen((0, 1, 6), (2, 9)).chunks(3) == {0: 2, 6: 1, 9: 1}
    for start in range(0, 18, 3):
        kept.put(start, torch.full((3, 16, 4, 6), float(start)), seen((), ()))
    assert sorted(kept.starts) == [0, 3, 6, 9, 12, 15]
    kept.put(18, torch.full((3, 16, 4, 6), 18.0), seen((0, 3, 6, 9), (0, 6, 12, 15)))
    assert sorted(kept.starts) == [0, 6, 9, 12, 15, 18]  # 3, 9, 12 and 15 are shown by one layer
    assert all(float(kept.of(start)[0, 0, 0, 0]) == start for start in kept.starts)
    assert kept.latents.data_ptr() == place
