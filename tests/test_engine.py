"""Engine and session: what a stream yields, when, and that nothing but its arguments decides it."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch

from cfengine.config import POLICIES, TINY_MODEL, EngineConfig, MemoryConfig, VideoConfig, with_policy
from cfengine.errors import CFEngineError, ConfigError, PromptError
from cfengine.memory.memory import Memory
from cfengine.scheduler import chunk as chunk_module
from cfengine.scheduler.sampler import chunk_noise
from cfengine.session import Session

pytestmark = pytest.mark.cpu


def pixels(frames) -> np.ndarray:
    return np.stack([frame.pixels for frame in frames])


@pytest.mark.parametrize("wanted", [1, 5, 9, 10, 21, 30])
def test_any_number_of_frames(toy_engine, wanted):
    frames = list(toy_engine().stream("a b", num_frames=wanted))
    assert [frame.index for frame in frames] == list(range(wanted))
    assert [frame.time for frame in frames] == [i / 16 for i in range(wanted)]
    assert all(frame.pixels.shape == (32, 48, 3) and frame.pixels.dtype == np.uint8 for frame in frames)
    assert [frame.timings.chunk for frame in frames] == [0 if i < 9 else 1 + (i - 9) // 12 for i in range(wanted)]


def test_a_short_stream_is_the_beginning_of_a_long_one(toy_engine):
    engine = toy_engine()
    assert np.array_equal(pixels(engine.stream("a", num_frames=14)), pixels(engine.stream("a", num_frames=33))[:14])


def test_seed_and_prompt_decide_and_history_does_not(toy_engine):
    engine = toy_engine()
    first = pixels(engine.stream("a b", seed=5, num_frames=21))
    list(engine.stream("c", seed=9, num_frames=12))
    assert np.array_equal(first, pixels(engine.stream("a b", seed=5, num_frames=21)))
    assert not np.array_equal(first, pixels(engine.stream("a b", seed=6, num_frames=21)))
    assert not np.array_equal(first, pixels(engine.stream("c d e", seed=5, num_frames=21)))
    assert np.array_equal(first, pixels(toy_engine().stream("a b", seed=5, num_frames=21)))


def test_two_sessions_do_not_disturb_each_other(toy_engine):
    engine = toy_engine()
    alone = pixels(engine.stream("a", seed=1, num_frames=33))
    one, two = engine.stream("a", seed=1, num_frames=33), engine.stream("b", seed=2, num_frames=33)
    mixed = [pair[0] for pair in zip(one, two, strict=True)]
    assert np.array_equal(alone, pixels(mixed))


class Passes:
    """Records the passes that run: (start frame, clean)."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple[int, bool]] = []
        walk = chunk_module.walk

        def recorded(segments, memory, latents, step, *args, **kwargs):
            self.log.append((step.start_frame, step.clean))
            return walk(segments, memory, latents, step, *args, **kwargs)

        monkeypatch.setattr(chunk_module, "walk", recorded)


def test_frames_leave_before_the_clean_pass(toy_engine, monkeypatch):
    passes = Passes(monkeypatch)
    stream = toy_engine().stream("a", num_frames=21)
    assert passes.log == []  # nothing runs before the first frame is asked for
    next(stream)
    assert passes.log == [(0, False)] * 4
    for _ in range(8):
        next(stream)
    assert passes.log == [(0, False)] * 4
    next(stream)
    assert passes.log == [(0, False)] * 4 + [(0, True)] + [(3, False)] * 4
    assert len(list(stream)) == 11
    assert passes.log[-1] == (3, False)  # no clean pass after the last chunk


def test_closing_the_stream_stops_the_work(toy_engine, monkeypatch):
    passes = Passes(monkeypatch)
    engine = toy_engine()
    stream = engine.stream("a")
    for _ in range(10):
        next(stream)
    done = len(passes.log)
    stream.close()
    assert len(passes.log) == done and not engine._sessions
    assert next(stream, None) is None


def test_an_endless_stream_goes_on(toy_engine):
    frames = list(itertools.islice(toy_engine().stream("a"), 150))
    assert frames[-1].index == 149 and np.isfinite(frames[-1].time)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_streams_in_constant_memory(toy_engine, policy):
    engine = toy_engine(memory=with_policy(MemoryConfig(), policy))
    with engine.session("a", seed=1) as session:
        size, pages = session.memory.bytes, session.memory.pool.k.data_ptr()
        shown = pixels(itertools.islice(session.frames(), 12 * 12))
        assert (session.memory.bytes, session.memory.pool.k.data_ptr()) == (size, pages)
        assert int(session.memory.tables.stacked.count.max()) <= engine.config.memory.slots
        assert torch.isfinite(session.latents).all()
    assert shown.std() > 1


def test_both_clean_passes_leave_the_same_pages(toy_engine):
    """A clean pass that stops at the last block's keys and values leaves what a full one leaves, bit for bit."""
    engine = toy_engine()
    states = []
    for full in (False, True):
        memory = Memory(engine.config, engine.ops, torch.float32)
        cross = engine.encode_prompt("a b")
        for start in range(0, 36, 3):
            noise = lambda i, start=start: chunk_noise(4, start, 3, i, (16, 4, 6))  # noqa: E731
            x0 = engine._scheduler.denoise(memory, cross, start, noise)
            result = engine._scheduler.clean_pass(memory, cross, start, x0, full=full)
            assert (result is not None) == full
        states.append((memory.pool.k, memory.pool.v, *memory.tables.stacked[:8]))
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_priming_is_the_past(toy_engine):
    """A session primed with the latents of another goes on as that one did."""
    engine = toy_engine(memory=with_policy(MemoryConfig(), "slow_fast_paper"))
    with engine.session("a b", seed=3) as session:
        latents = []
        for _ in range(5):
            session.next_chunk()
            latents.append(session.latents)
        expected = session.next_chunk()
    with engine.session("a b", seed=3, latents=torch.cat(latents)) as primed:
        frames = primed.next_chunk()
    assert [frame.index for frame in frames] == [frame.index for frame in expected] == list(range(57, 69))
    assert np.array_equal(pixels(frames), pixels(expected))
    with pytest.raises(ConfigError, match=r"\(4, 16, 4, 6\).*multiple of 3"):
        engine.session("a", latents=torch.zeros(4, 16, 4, 6))
    assert not engine._sessions


def test_streams_that_never_start_leave_nothing(toy_engine):
    engine = toy_engine()
    streams = [engine.stream("a") for _ in range(3)]
    for stream in streams:
        stream.close()
        assert next(stream, None) is None
    assert not engine._sessions


def test_the_garbage_collector_closes_nothing(toy_engine, monkeypatch):
    """It may come in the middle of any call, with locks held; what a dropped stream had, the next session has."""
    engine = toy_engine(max_sessions=1)
    closed = []
    with monkeypatch.context() as patch:
        patch.setattr(Session, "close", lambda session: closed.append(session))
        ring = [engine.stream("a")]
        next(ring[0])
        ring.append(ring)
        del ring
        gc.collect()
    assert not closed and engine.pages.in_use == 0
    with engine.stream("a", num_frames=21) as stream:
        assert len(list(stream)) == 21


@pytest.mark.parametrize("where", ["denoise", "clean_pass", "decode"])
def test_half_a_chunk_closes_the_session(toy_engine, monkeypatch, where):
    """Pages, similarity and decoder would be ahead of the counters: going on must not be possible."""
    engine = toy_engine()
    session = engine.session("a")
    session.next_chunk()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    lane = session._lane
    monkeypatch.setattr(lane._decoders[0] if where == "decode" else lane._scheduler, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.next_chunk()
    assert session.closed and not engine._sessions
    with pytest.raises(CFEngineError, match="session is closed"):
        session.next_chunk()


def test_a_refused_prompt_changes_nothing(toy_engine):
    engine = toy_engine()
    with engine.session("a", seed=1) as session, engine.session("a", seed=1) as other:
        with pytest.raises(PromptError):
            session.set_prompt("x " * 13)
        assert session.prompt == "a"
        assert np.array_equal(pixels(session.next_chunk()), pixels(other.next_chunk()))


def test_prompt_can_change_between_chunks(toy_engine):
    engine = toy_engine()
    with engine.session("a", seed=1) as session, engine.session("a", seed=1) as other:
        assert np.array_equal(pixels(session.next_chunk()), pixels(other.next_chunk()))
        other.set_prompt("d e")
        assert not np.array_equal(pixels(session.next_chunk()), pixels(other.next_chunk()))


def test_scenes_of_infinity_rope(toy_engine, monkeypatch):
    memory = MemoryConfig(policy="relative_window", sink=1, slow=0, fast=5, scenes=True)
    engine = toy_engine(memory=memory)
    with engine.session("a[0.75s#] | b[1.5s] | c", seed=1) as session:
        prompts = []
        for _ in range(5):
            session.next_chunk()
            prompts.append(session.prompt)
            if len(prompts) == 2:
                assert session.memory.tables.layers[0].q_positions.tolist() == [45, 46, 47]
    assert prompts == ["a", "b", "b", "c", "c"]
    with pytest.raises(PromptError, match="13 words"):  # at the call, not when its turn comes
        engine.stream("a[1s] | " + "x " * 13)


def test_timings_and_memory_events(toy_engine):
    engine = toy_engine(memory=with_policy(MemoryConfig(), "uniform"))
    chunks = {frame.timings.chunk: frame.timings for frame in engine.stream("a", num_frames=9 + 12 * 13)}
    assert chunks[0].text > 0 and chunks[1].text == 0
    assert chunks[0].clean == 0 and chunks[1].clean > 0
    assert all(t.denoise > 0 and t.decode > 0 and t.total >= t.denoise + t.decode for t in chunks.values())
    promotions = [chunks[i].memory.promotions for i in range(14)]
    # every second chunk from frame 6 on is kept, in both layers
    assert promotions == [2 if i >= 2 and i % 2 == 0 else 0 for i in range(14)]
    # 21 slots are full after chunk 6; until then a promotion overwrites an old frame in slow memory, from then on a
    # chunk also pushes three frames a layer out of fast memory, one of which slow memory may hold
    assert all(4 <= chunks[i].memory.evictions <= 8 for i in range(7, 14))


def test_bfloat16_is_close_to_float32(toy_engine):
    exact = toy_engine()
    rough = toy_engine(dtype=torch.bfloat16)
    with exact.session("a", seed=2) as one, rough.session("a", seed=2) as two:
        one.next_chunk()
        two.next_chunk()
        # 8 bits of mantissa through two random blocks and four passes: a few percent of the largest value
        error = (one.latents - two.latents).abs().max() / one.latents.abs().max()
        assert 0 < error < 0.1


@pytest.mark.parametrize("bad", [0, -1, 1.5, "9"])
def test_bad_lengths(toy_engine, bad):
    with pytest.raises(ConfigError, match="num_frames"):
        toy_engine().stream("a", num_frames=bad)


def test_bad_arguments(toy_engine):
    engine = toy_engine()
    with pytest.raises(PromptError, match="empty"):
        engine.stream("  ")
    with pytest.raises(PromptError, match="13 words"):
        engine.stream("x " * 13)
    with pytest.raises(ConfigError, match="seed is -1"):
        engine.stream("a", seed=-1)
    with pytest.raises(ConfigError, match="width 100 is not a multiple of 8"):
        VideoConfig(width=100, height=64)
    with pytest.raises(ConfigError, match="width 104 is not a multiple of 16 .codec stride 8 x patch 2"):
        EngineConfig(name="a", video=VideoConfig(width=104, height=64))
    with pytest.raises(ConfigError, match="height 48 is not a multiple of 32 .codec stride 8 x patch 4"):
        EngineConfig(name="a", model=TINY_MODEL, video=VideoConfig(width=104, height=48))
    engine.close()
    with pytest.raises(CFEngineError, match="closed"):
        engine.stream("a")


def test_a_closed_session_says_so(toy_engine):
    session = toy_engine().session("a")
    session.close()
    session.close()
    with pytest.raises(CFEngineError, match="session is closed"):
        session.next_chunk()
