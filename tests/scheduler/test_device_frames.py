"""Frames that stay on the device, on the lane of a GPU with stand-ins; and all the way into a ring of device memory."""

from __future__ import annotations

import mmap
import threading
import uuid

import numpy as np
import pytest
import torch

from cfengine.cli_serve import Request, check
from cfengine.embed import Format, Memory, Policy, State
from cfengine.embed import device as device_module
from cfengine.errors import ConfigError, FaultError, OutputError
from cfengine.video import VideoWriter
from tests.embed.standin import MemfdMemory, reader_beside

pytestmark = [pytest.mark.cpu, pytest.mark.embed]


def chunks(session, count: int) -> list:
    return [frame for _ in range(count) for frame in session.next_chunk()]


def same(ours: list, theirs: list) -> bool:
    assert all(isinstance(frame.pixels, torch.Tensor) and frame.pixels.dtype is torch.uint8 for frame in ours)
    pairs = zip(ours, theirs, strict=True)
    return all(np.array_equal(one.pixels.numpy(), two.pixels) and one.index == two.index for one, two in pairs)


def test_frames_are_those_of_a_session_on_the_host(device_engine):
    engine = device_engine()
    with engine.session("a b", seed=3) as plain, engine.session("a b", seed=3, frames="device") as session:
        assert same(chunks(session, 3), chunks(plain, 3))
        for each in (plain, session):
            each.set_prompt("c")
        with session.branch() as branch, engine.resume(session.snapshot(), frames="device") as resumed:
            expected = chunks(plain, 1)
            assert same(chunks(session, 1), expected) and same(chunks(branch, 1), expected)
            assert same(chunks(resumed, 1), expected)
        with plain.branch() as branch, engine.resume(session.snapshot()) as resumed:
            assert all(isinstance(frame.pixels, np.ndarray) for each in (branch, resumed) for frame in chunks(each, 1))


def test_frames_are_the_consumers_own(device_engine):
    """Nothing that is made later changes them; a lane that serves a session on the host next serves it so."""
    engine, places = device_engine(), {}

    def as_a_graph(call):
        """What it returns lies where it lay the last time."""

        def replay() -> torch.Tensor:
            frames = call()
            return places.setdefault(len(frames), torch.empty_like(frames)).copy_(frames)

        return replay

    with engine.session("a", seed=1, frames="device") as session:
        session._lane._draw = [tuple(map(as_a_graph, calls)) for calls in session._lane._draw]
        frames = chunks(session, 2)
        kept = [frame.pixels.clone() for frame in frames]
        chunks(session, 4)
        assert all(torch.equal(frame.pixels, copy) for frame, copy in zip(frames, kept, strict=True))
    with engine.session("a", seed=1) as session:
        assert same(frames, chunks(session, 2))


def test_frames_are_complete_and_lent_to_the_consumers_stream(device_engine, monkeypatch):
    engine = device_engine()
    lent, log = [], engine._runtime.log
    monkeypatch.setattr(engine._runtime, "lend", lambda tensor: lent.append((tensor.shape, log[-1])))
    with engine.session("a", frames="device") as session:
        (first, *_), shape = session.next_chunk(), (9, 32, 48, 3)
        assert [when for found, when in lent if found == shape] == ["wait"], "after the host has waited for them"
        assert first.pixels.shape == shape[1:]


def test_a_decoder_that_fails_is_told_as_ever(device_engine, monkeypatch):
    engine = device_engine()
    with engine.session("a", frames="device") as session:
        session.next_chunk()
        monkeypatch.setattr(session._lane, "_draw", [(None, lambda: [][0])])
        with pytest.raises(FaultError, match="decoding chunk 1 failed"):
            session.next_chunk()
        assert session.closed


def test_a_file_of_video_refuses_tensors(device_engine, tmp_path):
    with device_engine().session("a", frames="device") as session, VideoWriter(tmp_path / "a.mp4", fps=16) as writer:
        with pytest.raises(OutputError, match="a frame is torch.uint8"):
            writer.write(session.next_chunk()[0].pixels)


def test_only_a_gpu_keeps_frames(toy_engine):
    engine = toy_engine()
    with pytest.raises(ConfigError, match="stay on a GPU alone, and this engine runs on cpu"):
        engine.session("a", frames="device")
    with pytest.raises(ConfigError, match="frames is 'gpu'; choose 'host' or 'device'"):
        engine.session("a", frames="gpu")
    with pytest.raises(ConfigError, match="runs on cpu"), engine.session("a") as session:
        engine.resume(session.snapshot(), frames="device")
    with pytest.raises(ConfigError, match="runs on cpu"):
        engine.publish("a", f"test-{uuid.uuid4().hex[:8]}", memory="opaque_fd")
    with pytest.raises(ConfigError, match="unknown memory 'gpu'; choose one of host, cuda_ipc, opaque_fd"):
        engine.publish("a", f"test-{uuid.uuid4().hex[:8]}", memory="gpu")


@pytest.mark.parametrize("format", list(Format))
def test_a_session_into_a_ring_of_device_memory(device_engine, monkeypatch, format):
    """`Engine.publish`: what a reader finds in the memory that it was passed is the session, frame by frame."""
    monkeypatch.setattr(device_module, "allocate", MemfdMemory)
    engine, name, seen, done = device_engine(), f"test-{uuid.uuid4().hex[:8]}", [], []
    with engine.session("a", seed=5) as session:
        expected = [frame.pixels for frame in chunks(session, 2)]
    about = {"seed": 5, "num_frames": 21, "format": format.name.lower(), "memory": "opaque_fd"}
    thread = threading.Thread(target=lambda: done.append(engine.publish("a", name, **about)))
    thread.start()
    reader = reader_beside(thread, name)
    with reader, reader.device_memory() as handle:
        whole = torch.frombuffer(mmap.mmap(handle.fd, handle.size), dtype=torch.uint8)
        while len(seen) < 21:
            with reader.acquire(Policy.NEXT, timeout=30) as frame:
                assert frame.memory is Memory.OPAQUE_FD and frame.generation == handle.generation
                seen.append([plane.clone() for plane in frame.planes_in(whole)])
        thread.join()
        assert reader.state().state is State.ENDED
    assert done[0].frames == 21
    for planes, pixels in zip(seen, expected, strict=True):
        wanted = [torch.zeros_like(plane) for plane in planes]
        device_module.convert(torch.from_numpy(pixels), tuple(wanted))
        assert all(torch.equal(one, two) for one, two in zip(planes, wanted, strict=True))


def test_serve_says_at_once_what_cannot_be():
    def request(memory: str, device: str) -> Request:
        return Request("demo", "a", "tiny-world", 1.0, 0, device, None, None, "rgba8", memory)

    with pytest.raises(ConfigError, match="--memory is 'gpu'; choose one of host, cuda_ipc, opaque_fd"):
        check(request("gpu", "cuda"))
    with pytest.raises(ConfigError, match="--memory opaque_fd is memory of a GPU, and --device is cpu; say cuda"):
        check(request("opaque_fd", "cpu"))
    check(request("host", "cpu"))
