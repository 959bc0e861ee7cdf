"""What goes wrong in one session is told once, as an error of ours, and no other session sees anything of it."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch

from cfengine.config import MemoryConfig
from cfengine.errors import CFEngineError, ConfigError, DeviceError, FaultError

pytestmark = pytest.mark.cpu

SMALL = MemoryConfig(slow=3)  # full after four chunks
LANES = ["toy_engine", "device_engine"]


def chunks(session, count: int) -> list[bytes]:
    made = [session.next_chunk() for _ in range(count)]
    return [b"".join(frame.pixels.tobytes() for frame in frames) for frames in made]


@contextmanager
def failing(engine, where: str, error: Exception | None):
    """Denoise passes or decoders of the engine raise, or make NaN."""
    scheduler = engine._scheduler
    with pytest.MonkeyPatch.context() as patch:
        if where == "decode":
            for name in ("decode", "draw"):
                patch.setattr(engine._lanes.codec.Decoder, name, lambda *args: raising(error))
        else:
            plain = scheduler.denoise
            patch.setattr(scheduler, "denoise", lambda *args, **more: raising(error) or spoilt(plain(*args, **more)))
        yield


def raising(error: Exception | None) -> None:
    if error is not None:
        raise error


def spoilt(x0: torch.Tensor) -> torch.Tensor:
    """One number of the last latent frame is lost."""
    x0 = x0.clone()
    x0[-1, 2, 1, 3] = float("inf") if x0.shape[0] > 3 else float("nan")
    return x0


FULL = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"
CASES = {
    "a decoder": ("decode", ValueError("bad weights"), FaultError, r"chunk 3 failed \(ValueError: bad weights\)"),
    "no memory to decode": ("decode", torch.OutOfMemoryError(FULL), DeviceError, "out of memory: 2.00 GiB were"),
    "no memory": ("denoise", torch.OutOfMemoryError(FULL), DeviceError, "out of memory: 2.00 GiB were asked for"),
    "no memory on a CPU": (
        "denoise",
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes"),
        DeviceError,
        "out of memory: 1.00 GiB were asked for",
    ),
    "no memory for Python": ("denoise", MemoryError(), DeviceError, "out of memory"),
    "a GPU": ("denoise", RuntimeError("CUDA error: misaligned address"), DeviceError, "misaligned address"),
    "not a number": ("denoise", None, FaultError, r"latents of shape \(3, 16, 4, 6\) are not all finite"),
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("case", CASES)
def test_a_fault_ends_its_session_alone(request, lane: str, case: str, beside_a_healthy_one) -> None:
    where, error, kind, words = CASES[case]
    engine = request.getfixturevalue(lane)(memory=SMALL, max_sessions=2)
    with beside_a_healthy_one(engine):
        session = engine.session("a", seed=3)
        before = chunks(session, 3)
        with failing(engine, where, error), pytest.raises(kind, match=words):
            session.next_chunk()
        assert session.closed and engine.pages.reserved == engine.pages.total // 2
        with pytest.raises(CFEngineError, match=re.escape("this session is closed")):
            session.next_chunk()
        with engine.session("a", seed=3) as again:
            assert chunks(again, 3) == before, "what it left behind is seen by nobody"


@pytest.mark.parametrize("lane", LANES)
def test_what_is_not_finite_in_one_of_a_batch_ends_it_alone(request, lane: str) -> None:
    engine = request.getfixturevalue(lane)(memory=SMALL)
    with engine.batch(["b", "a"], seeds=[1, 2]) as plain:
        expected = [[b"".join(f.pixels.tobytes() for f in part) for part in plain.next_chunk()] for _ in range(3)]
    with engine.batch(["b", "a"], seeds=[1, 2]) as batch:
        batch.next_chunk()
        one, two = batch.sessions
        with failing(engine, "denoise", None):
            made = batch.next_chunk()
        assert b"".join(frame.pixels.tobytes() for frame in made[0]) == expected[1][0] and made[1] == []
        ((session, error),) = batch.faults()
        assert session is two and two.closed and isinstance(error, FaultError) and error.part == "latents"
        (frames,) = batch.next_chunk()
        theirs = expected[2][0]  # of passes over two sessions: other products, and a level at most from their rounding
        ours = b"".join(frame.pixels.tobytes() for frame in frames)
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1 and not one.closed


def test_a_past_that_is_not_finite_is_refused(toy_engine) -> None:
    engine = toy_engine()
    past = torch.zeros(3, 16, 4, 6)
    past[1, 2, 3, 4] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        engine.session("a", latents=past)
    assert not engine._sessions
