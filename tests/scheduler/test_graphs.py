"""Captured graphs on a GPU: equal to launching anew, never a word to the host, and nothing that grows."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from cfengine.config import (
    POLICIES,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    PrecisionConfig,
    VideoConfig,
    with_policy,
)
from cfengine.errors import FaultError
from cfengine.events import Prompt, Reset
from cfengine.scheduler import graphs
from cfengine.snapshot import Snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = EngineConfig(
    name="small",
    # heads of 64, which every kernel of attention has
    model=ModelConfig(dim=128, ffn_dim=256, heads=2, layers=2, text_dim=8, text_len=12, freq_dim=16),
    memory=MemoryConfig(),
    video=VideoConfig(width=48, height=32),
)
# bfloat16: the same kernels over the same numbers, so that nothing but a wrong buffer tells them apart
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def gpu_engine(toy_engine):
    def make(kernels=(), config=SMALL, **options):
        return toy_engine(dataclasses.replace(config, kernels=kernels), device="cuda", dtype=torch.bfloat16, **options)

    return make


@pytest.fixture
def no_waiting():
    """Make every synchronisation of torch an error while a test says so."""

    def forbid(on: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield forbid
    forbid(False)


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_equals_launching_anew(gpu_engine, policy):
    """From the first chunk until the memory has been full for a while, prompts changed on the way."""
    memory = with_policy(MemoryConfig(slow=3), policy)
    captured, eager = gpu_engine(memory=memory), gpu_engine(memory=memory, graphs=False)
    with captured.session("a b", seed=5) as one, eager.session("a b", seed=5) as two:
        for number in range(7):
            if number in (2, 5):
                for session in (one, two):
                    session.set_prompt("c d e f g h i" if number == 2 else "j")
            ours, theirs = one.next_chunk(), two.next_chunk()
            torch.testing.assert_close(one.latents, two.latents, **EXACT)
            assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))
            assert ours[0].timings.memory == theirs[0].timings.memory


def test_levels_of_effort_and_new_beginnings(gpu_engine):
    """Each level replays as it launches anew, and what follows a `Reset` is a new stream."""
    captured, eager = gpu_engine(efforts=True), gpu_engine(efforts=True, graphs=False)
    with captured.session("a b", seed=5) as one, eager.session("a b", seed=5) as two:
        levels = (0, 2, 1, 3, 3, 0, 2)  # the fifth chunk has more behind it than it reads
        latents = []
        for number, level in enumerate(levels * 2):
            one.effort = two.effort = level
            if number == len(levels):
                for session in (one, two):
                    session.push(Reset(), wait=True)
            ours, theirs = one.next_chunk(), two.next_chunk()
            torch.testing.assert_close(one.latents, two.latents, **EXACT)
            assert ours[0].timings.passes == theirs[0].timings.passes == (4, 3, 2, 2)[level]
            latents.append(one.latents.cpu())
    for first, again in zip(latents[: len(levels)], latents[len(levels) :], strict=True):
        torch.testing.assert_close(first, again, **EXACT)


def test_a_stream_beside_captures_in_another_thread(gpu_engine):
    """Sessions that are opened, and so captured, while another streams: each shows what it shows alone."""
    engine = gpu_engine()
    with engine.session("a b", seed=5) as session:
        expected = [frame.pixels for _ in range(12) for frame in session.next_chunk()]
    others = []

    def open_others() -> None:
        for _ in range(4):
            others.append(engine.session("a b", seed=5))

    with engine.session("a b", seed=5) as session:
        opening = threading.Thread(target=open_others)
        opening.start()
        shown = [frame.pixels for _ in range(12) for frame in session.next_chunk()]
        opening.join()
    assert len(others) == 4 and all(np.array_equal(one, two) for one, two in zip(shown, expected, strict=True))
    for other in others:
        first = [frame.pixels for frame in other.next_chunk()]
        assert all(np.array_equal(one, two) for one, two in zip(first, expected, strict=False))


def test_latents_that_are_not_finite_are_found(gpu_engine):
    engine = gpu_engine()
    with engine.session("b", seed=2) as other:
        session = engine.session("a", seed=1)
        session.next_chunk()
        torch.cuda.synchronize()
        session.memory.pool.v.fill_(float("nan"))
        with pytest.raises(FaultError, match="not all finite"):
            session.next_chunk()
        assert session.closed and len(other.next_chunk()) == 9


def test_scenes_and_cuts(gpu_engine):
    memory = MemoryConfig(policy="relative_window", sink=1, slow=0, fast=5, scenes=True)
    prompt = "a[1.5s#] | b[0.75s] | c"
    captured, eager = gpu_engine(memory=memory), gpu_engine(memory=memory, graphs=False)
    with captured.session(prompt, seed=2) as one, eager.session(prompt, seed=2) as two:
        for _ in range(6):
            one.next_chunk()
            two.next_chunk()
            torch.testing.assert_close(one.latents, two.latents, **EXACT)


def test_a_stream_is_close_to_the_cpu(gpu_engine, toy_engine):
    with (
        gpu_engine().session("a", seed=2) as fast,
        toy_engine(SMALL, dtype=torch.bfloat16).session("a", seed=2) as slow,
    ):
        ours, theirs = fast.next_chunk(), slow.next_chunk()
        # 8 bits of mantissa through two random blocks and four passes: a few percent of the largest value
        error = (fast.latents.cpu() - slow.latents).abs().max() / slow.latents.abs().max()
        assert error < 0.1 and len(ours) == len(theirs) == 9


def test_three_chunks_without_waiting(gpu_engine, no_waiting):
    """Also the first one, also across a change of prompt; the wait for frames is on an event."""
    with gpu_engine().session("a b", seed=1) as session:
        for prompt in ("c d e", "f"):
            session.set_prompt(prompt)  # the text encoder may run on the host
        session.push(Prompt("a b"))
        no_waiting(True)
        session.next_chunk()
        session.push(Prompt("c d e"))  # was encoded, so it counts from the next chunk on
        session.next_chunk()
        frames = session.next_chunk()
        no_waiting(False)
    assert len(frames) == 12 and all(t > 0 for t in (frames[0].timings.denoise, frames[0].timings.clean))


def test_prompts_change_without_capturing_again(gpu_engine, monkeypatch):
    engine = gpu_engine()
    made, graph = [], graphs.Graph.__init__

    def counted(self, work, *args):
        made.append(work.__name__)
        graph(self, work, *args)

    monkeypatch.setattr(graphs.Graph, "__init__", counted)
    with engine.session("a", seed=1) as session, engine.session("a", seed=1) as other:
        assert made == ["denoise", "clean", "first", "later"] * 2
        assert np.array_equal(session.next_chunk()[0].pixels, other.next_chunk()[0].pixels)
        other.set_prompt("d e f g")
        assert not np.array_equal(session.next_chunk()[0].pixels, other.next_chunk()[0].pixels)
        assert len(made) == 8


def test_a_lane_that_was_used_shows_what_a_new_one_shows(gpu_engine, monkeypatch):
    """Bit for bit, and without capturing again; the session before is closed while its clean pass runs."""
    engine = gpu_engine()
    past = torch.randn(6, 16, 4, 6, generator=torch.Generator().manual_seed(0))

    def seen(latents):
        with engine.session("a b", seed=5, latents=latents) as session:
            frames = [frame for _ in range(8) for frame in session.next_chunk()]
            return [frame.pixels for frame in frames], session.latents

    expected = seen(None)
    monkeypatch.setattr(graphs.Graph, "__init__", None)
    seen(past)
    pixels, latents = seen(None)
    assert torch.equal(latents, expected[1])
    assert all(np.array_equal(*pair) for pair in zip(pixels, expected[0], strict=True))


@pytest.mark.parametrize("switch", ["recache", "blend(3)"])
@pytest.mark.parametrize("policy", ["slow_fast", "slow_fast_diverse", "sink_window"])
def test_switches_in_a_full_memory(gpu_engine, policy, switch):
    memory = with_policy(MemoryConfig(slow=3), policy)
    captured, eager = gpu_engine(memory=memory), gpu_engine(memory=memory, graphs=False)
    with captured.session("a b", seed=5) as one, eager.session("a b", seed=5) as two:
        for number in range(8):
            if number == 5:
                for session in (one, two):
                    session.set_prompt("c d e", switch)
            ours, theirs = one.next_chunk(), two.next_chunk()
            torch.testing.assert_close(one.latents, two.latents, **EXACT)
            assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))
            assert (ours[0].timings.recache > 0) == (switch == "recache" and number == 5)


@pytest.mark.parametrize("pages", ["bf16", "fp8"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_stream_goes_on_from_a_snapshot(gpu_engine, tmp_path, device, pages):
    """Rewound, branched and resumed from a file, on lanes new and used: bit for bit."""
    config = dataclasses.replace(SMALL, precision=PrecisionConfig(pages=pages), memory=MemoryConfig(slow=3))
    engine = gpu_engine(config=config)
    with engine.session("a b", seed=5) as session:
        for _ in range(5):
            session.next_chunk()
        session.set_prompt("c", "blend(4)")
        session.next_chunk()
        snapshot = session.snapshot(device=device)
        snapshot.save(tmp_path / "snapshot")
        branch = session.branch()
        expected = [frame.pixels for _ in range(4) for frame in session.next_chunk()]
        session.rewind(snapshot)
        again = engine.resume(Snapshot.load(tmp_path / "snapshot", device=device))
        for each in (session, branch, again):
            found = [frame.pixels for _ in range(4) for frame in each.next_chunk()]
            assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
            each.close()


def test_text_is_encoded_while_graphs_are_captured_and_replayed(gpu_engine):
    """Keys and values of a thread of its own are those of the caller's, and disturb nothing."""
    quiet, busy = gpu_engine(), gpu_engine()
    words = [f"{a} {b}" for a in "abcdefgh" for b in "klmnopqr"]
    for prompt in words:
        busy.prefetch(prompt)
    with busy.session("a b", seed=5) as one, quiet.session("a b", seed=5) as two:
        for prompt in words[:4]:
            for session in (one, two):
                session.set_prompt(prompt)
            ours, theirs = one.next_chunk(), two.next_chunk()
            assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))


def test_library_attention_is_captured_once_for_every_number_of_slots(gpu_engine):
    kernels = (("paged_attention", "sdpa"),)
    captured, eager = gpu_engine(kernels=kernels), gpu_engine(kernels=kernels, graphs=False)
    with captured.session("a b", seed=5) as one, eager.session("a b", seed=5) as two:
        for _ in range(8):  # 3, 6, ... 21 slots, then full
            one.next_chunk()
            two.next_chunk()
            torch.testing.assert_close(one.latents, two.latents, **EXACT)


def test_memory_is_constant(gpu_engine):
    with gpu_engine().session("a", seed=1) as session:
        for _ in range(3):
            session.next_chunk()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(30):
            session.next_chunk()
        torch.cuda.synchronize()
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_sessions_in_turn_do_not_disturb_each_other(gpu_engine):
    """Graphs of all sessions share their scratch memory."""
    engine = gpu_engine()
    with engine.session("a", seed=1) as alone:
        expected = [alone.next_chunk()[0].pixels for _ in range(4)]
    with engine.session("a", seed=1) as one, engine.session("b c", seed=2) as two:
        for pixels in expected:
            found = one.next_chunk()[0].pixels
            two.next_chunk()
            assert np.array_equal(found, pixels)


def test_a_batch_is_close_to_single_sessions(gpu_engine):
    engine = gpu_engine()
    with engine.batch(["a b", "c"], seeds=[4, 5]) as batch, engine.session("c", seed=5) as alone:
        for _ in range(3):
            batch.next_chunk()
            alone.next_chunk()
            # bfloat16 products over more rows may run through another kernel
            error = (batch.sessions[1].latents - alone.latents).abs().max() / alone.latents.abs().max()
            assert error < 0.1


@pytest.mark.parametrize("pages", ["bf16", "fp8"])
@pytest.mark.parametrize("policy", ["slow_fast", "slow_fast_diverse", "sink_window"])
def test_branches_that_share_pages(gpu_engine, policy, pages):
    """In graphs that say who may write a page: bit for bit what branches with pages of their own show."""
    config = dataclasses.replace(SMALL, precision=PrecisionConfig(pages=pages))
    memory = with_policy(MemoryConfig(slow=3), policy)
    shown = []
    for most in (None, 3):
        engine = gpu_engine(config=config, memory=memory, max_sessions=most)
        with engine.session("a b", seed=5) as session:
            for _ in range(5):
                session.next_chunk()
            with session.branch() as one, one.branch() as two:
                one.set_prompt("c d", "recache")
                chunks = [each.next_chunk() for _ in range(5) for each in (two, one, session)]
                shown.append([frame.pixels for chunk in chunks for frame in chunk])
    assert all(np.array_equal(*pair) for pair in zip(*shown, strict=True))
    assert engine.pages.in_use == 0


def test_a_captured_batch_is_joined_and_left(gpu_engine):
    """Places change hands; the same calls launched anew show the same."""
    shown = []
    for graphs_on in (True, False):
        engine = gpu_engine(memory=MemoryConfig(slow=3), max_sessions=3, graphs=graphs_on)
        latents = []
        with engine.batch(["a b", "c"], seeds=[4, 5]) as batch:
            for number in range(8):
                if number == 2:
                    batch.join("d e f", seed=6)
                if number == 5:
                    batch.sessions[0].close()
                batch.next_chunk()
                latents += [session.latents for session in batch.sessions]
        shown.append(latents)
    for one, two in zip(*shown, strict=True):
        torch.testing.assert_close(one, two, **EXACT)


def test_a_ready_engine_allocates_nothing(gpu_engine, no_waiting):
    engine = gpu_engine(memory=MemoryConfig(slow=3), max_sessions=3)
    engine.batch().close()  # its graphs too
    sizes = set()
    for number in range(8):
        with engine.session("a", seed=number) as one, one.branch() as two:
            no_waiting(True)
            one.next_chunk()
            two.next_chunk()
            no_waiting(False)
        with engine.batch(["a", "b", "c"]) as batch:
            batch.next_chunk()
        torch.cuda.synchronize()
        sizes |= {(torch.cuda.memory_allocated(), torch.cuda.memory_reserved())} if number > 1 else set()
    assert len(sizes) == 1


@pytest.mark.parametrize("codec", ["taehv", "wan_vae"])
def test_decoders_are_captured(codec):
    """First chunk and later ones, the past in place, against the decoder launched anew."""
    from cfengine.bench.synthetic import SIZES, random_codec
    from cfengine.scheduler.program import DecodeProgram

    if codec == "wan_vae":
        pytest.importorskip("diffusers", reason="pip install diffusers")
    made = random_codec(dataclasses.replace(SIZES["toy"], codec=codec), "cuda", torch.bfloat16)
    latents = torch.randn(5, 3, 16, 8, 8, device="cuda")
    runtime = graphs.CudaRuntime("cuda")
    with runtime.on(runtime.decoding), torch.inference_mode():
        program = DecodeProgram(made.decoder(), torch.zeros(3, 16, 8, 8, device="cuda"))
        program.first()
        program.later()
        first, later = (runtime.capture(work, runtime.decoding) for work in (program.first, program.later))
        plain = made.decoder()
        for number, chunk in enumerate(latents):
            program.latents.copy_(chunk)
            frames, expected = (later if number else first)(), plain.draw(chunk)
            assert frames.shape[0] == (12 if number else 9)
            # convolutions may pick another algorithm inside a graph: one level where a value sits on a rounding edge
            assert (frames.int() - expected.int()).abs().max() <= 1
