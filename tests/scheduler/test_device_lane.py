"""The lane of a GPU, with stand-ins for streams and graphs, against the lane of a CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cfengine.codec.taehv import TAEHV, TAEHVCodec
from cfengine.codec.tiny_world import TinyWorldCodec
from cfengine.config import POLICIES, MemoryConfig, with_policy
from cfengine.errors import ConfigError
from cfengine.memory.memory import Memory
from cfengine.scheduler import noise as noise_module
from cfengine.scheduler.lane import Step
from cfengine.scheduler.noise import NoiseAhead
from cfengine.scheduler.program import ChunkProgram, DecodeProgram, PromptBuffers
from cfengine.scheduler.sampler import chunk_noise
from cfengine.session import Session

pytestmark = pytest.mark.cpu

# float32; padded keys of weight zero change the order of a softmax's sums, over four passes and two blocks
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def same_chunk(one, two, ours, theirs) -> None:
    torch.testing.assert_close(one.latents, two.latents, **CLOSE)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.index, mine.time) == (other.index, other.time)
        assert np.abs(mine.pixels.astype(int) - other.pixels).max() <= 1  # where a value sits on a rounding edge
    assert ours[0].timings.memory == theirs[0].timings.memory
    two._lane._pay()  # the clean pass that is through on the other side
    for name in ("page_ids", "positions", "sources", "count", "q_positions", "spare_ids", "promoted", "seen"):
        tables = (getattr(session.memory.tables.stacked, name) for session in (one, two))
        assert torch.equal(*tables), name


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_is_that_of_the_other_lane(toy_engine, device_session, policy):
    """First chunk, prompts changed on the way, until the memory has been full for a while."""
    engine = toy_engine(memory=with_policy(MemoryConfig(slow=3), policy))
    with engine.session("a b", seed=5) as plain, device_session(engine, "a b", 5) as session:
        for number in range(7):
            if number in (2, 5):
                for each in (plain, session):
                    each.set_prompt("c d e f g h i" if number == 2 else "j")
            same_chunk(session, plain, session.next_chunk(), plain.next_chunk())


def test_scenes_and_cuts(toy_engine, device_session):
    memory = MemoryConfig(policy="relative_window", sink=1, slow=0, fast=5, scenes=True)
    engine = toy_engine(memory=memory)
    prompt = "a[1.5s#] | b[0.75s] | c"
    with engine.session(prompt, seed=2) as plain, device_session(engine, prompt, 2) as session:
        for _ in range(6):
            same_chunk(session, plain, session.next_chunk(), plain.next_chunk())


def test_priming(toy_engine, device_session):
    engine = toy_engine()
    past = torch.randn(6, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with engine.session("a", seed=1, latents=past) as plain, device_session(engine, "a", 1) as session:
        session.prime(past)
        for _ in range(2):
            same_chunk(session, plain, session.next_chunk(), plain.next_chunk())


def test_order_of_a_chunk(toy_engine, lane_of):
    """Passes, decoder, clean pass, then one wait: everything is queued before the host waits for frames."""
    engine = toy_engine()
    lane, runtime = lane_of(engine)
    with Session(engine.config, lane, engine._prompts, "a", 1) as session:
        assert runtime.log == []
        session.next_chunk()
        session.next_chunk()
        assert runtime.log == ["denoise", "first", "clean", "wait", "denoise", "later", "clean", "wait"]
    assert runtime.decoding.waits == ["denoise", "denoise"]  # latents are there
    assert runtime.compute.waits == ["denoise"]  # the decoder has taken the latents of the chunk before


def test_frames_outlive_the_buffers(toy_engine, device_session):
    engine = toy_engine()
    with device_session(engine, "a", 1) as session:
        frames = session.next_chunk()
        kept = [frame.pixels.copy() for frame in frames]
        for _ in range(3):
            session.next_chunk()
    assert all(np.array_equal(frame.pixels, copy) for frame, copy in zip(frames, kept, strict=True))


def test_timings(toy_engine, device_session):
    engine = toy_engine(memory=with_policy(MemoryConfig(), "uniform"))
    with device_session(engine, "a", 1) as session:
        timings = [session.next_chunk()[0].timings for _ in range(4)]
    assert all(t.denoise > 0 and t.decode > 0 for t in timings)
    assert [t.clean > 0 for t in timings] == [False, True, True, True]  # of the chunk before
    assert [t.memory.promotions for t in timings] == [0, 0, 2, 0]


def test_a_new_prompt_is_copied_in_place(toy_engine):
    engine = toy_engine()
    buffers = PromptBuffers(engine.config, torch.float32, torch.device("cpu"))
    places = [tensor.data_ptr() for cache in buffers.layers for tensor in cache]
    query = torch.randn(9, 2, 24)
    for prompt in ("a b c d e f g", "x"):  # the second is shorter: keys of the first must not shine through
        caches = engine.encode_prompt(prompt)
        buffers.load(caches)
        assert [tensor.data_ptr() for cache in buffers.layers for tensor in cache] == places
        for ours, theirs in zip(buffers.layers, caches, strict=True):
            attended = (engine.ops.cross_attention(query, *cache) for cache in (ours, theirs))
            torch.testing.assert_close(*attended, rtol=1e-5, atol=1e-6)  # float32, other order


def test_programs_keep_their_buffers(toy_engine):
    """Nothing that a graph would have written down moves from chunk to chunk."""
    engine = toy_engine()
    memory = Memory(engine.config, engine.ops, torch.float32)
    program = ChunkProgram(engine._scheduler, engine.config, [memory])
    places = [program.noise, program.x0, program.starts, program.cuts, memory.pool.k, *memory.tables.stacked]
    before = [tensor.data_ptr() for tensor in places]
    with torch.inference_mode():
        for start in (0, 3, 6):
            program.set(0, start, False, engine.encode_prompt("a"))
            program.noise.copy_(torch.stack([chunk_noise(1, start, 3, i, (16, 4, 6)) for i in range(4)]))
            program.denoise()
            program.clean()
    places = [program.noise, program.x0, program.starts, program.cuts, memory.pool.k, *memory.tables.stacked]
    assert [tensor.data_ptr() for tensor in places] == before
    assert int(memory.tables.layers[0].seen) == 9


def test_a_decoder_without_a_steady_past_is_refused():
    class Growing:
        def draw(self, latents):
            self.state = {0: torch.cat([self.state[0], latents]) if self.state else latents}
            return latents

    program = DecodeProgram(Growing(), torch.zeros(1, 16, 2, 2))
    program.first()
    with pytest.raises(ConfigError, match="1 latent frames.*at least 2"):
        program.later()


def test_noise_is_drawn_ahead_and_the_same():
    noise = NoiseAhead([torch.zeros(2, 6, 4, 3, 3) for _ in range(2)], frames=3)
    first = noise.take([(7, 0), (8, 0)])
    for step in range(2):
        expected = torch.cat([chunk_noise(7, 0, 3, step, (4, 3, 3)), chunk_noise(8, 0, 3, step, (4, 3, 3))])
        assert torch.equal(first[step], expected)
    noise.draw([(7, 3), (8, 3)])
    second = noise.take([(7, 3), (8, 3)])
    assert second.data_ptr() != first.data_ptr()  # the first may still be on its way to the device
    assert torch.equal(second[1, 3:], chunk_noise(8, 3, 3, 1, (4, 3, 3)))
    assert torch.equal(noise.take([(7, 30), (8, 0)])[0, :3], chunk_noise(7, 30, 3, 0, (4, 3, 3)))


def test_noise_that_was_interrupted_is_drawn_again(monkeypatch):
    noise = NoiseAhead([torch.zeros(2, 3, 4, 3, 3) for _ in range(2)], frames=3)
    noise.draw([(7, 0)])

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(noise_module, "counter_noise", interrupted)
        noise.draw([(7, 3)])
    assert torch.equal(noise.take([(7, 0)])[1], chunk_noise(7, 0, 3, 1, (4, 3, 3)))


def opaque(engine):
    """The engine's operations with what reads tables on a CPU replaced by what a kernel shows of itself: a result."""

    def store(q, k, v, *rest, **options):
        return None if q is None else q.view(q.shape[0], 2, -1).clone(), k.float().mean(0)

    def update(*args, **options):
        pass

    return dataclasses.replace(
        engine.ops,
        qk_norm_rope_store=store,
        paged_attention=lambda q, *rest, **options: q,
        slow_fast_update=update,
        slow_fast_paper_update=update,
        window_update=update,
    )


@pytest.mark.parametrize(
    ("policy", "sessions"), [("slow_fast", 1), ("slow_fast_paper", 1), ("relative_window", 1), ("slow_fast", 2)]
)
def test_the_host_reads_nothing_on_the_way(toy_engine, lane_of, no_reads, policy, sessions):
    """All that surrounds the kernels of a chunk, decoders included: no value leaves the device but the frames."""
    engine = toy_engine(memory=with_policy(MemoryConfig(), policy))
    engine.ops = opaque(engine)
    engine._scheduler = engine._make_scheduler(engine.ops)
    lane, _ = lane_of(engine, sessions)
    prompts = [engine.encode_prompt(prompt) for prompt in ("a b", "c")]
    with no_reads, torch.inference_mode():
        for number in range(3):
            steps = [Step(3 * number, seed, prompts[number % 2], opens=number == 1) for seed in range(sessions)]
            lane._launch(steps)
            lane._chunks += 1


@pytest.mark.parametrize("codec", ["taehv", "tiny_world"])
def test_decoders_read_nothing(no_reads, codec):
    if codec == "taehv":
        made = TAEHVCodec(TAEHV())
    else:
        made = TinyWorldCodec()
    program = DecodeProgram(made.decoder(), torch.randn(3, 16, 2, 2))
    plain = made.decoder()
    with no_reads, torch.inference_mode():
        first, later, again = program.first(), program.later(), program.later()
    assert (first.shape[0], later.shape[0]) == (9, 12)
    expected = [plain.draw(program.latents) for _ in range(3)]
    for found, wanted in zip((first, later, again), expected, strict=True):
        assert torch.equal(found, wanted)
