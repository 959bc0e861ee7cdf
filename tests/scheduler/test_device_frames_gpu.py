"""Frames that stay on a real GPU, and a ring in its memory."""

from __future__ import annotations

import threading
import uuid

import numpy as np
import pytest
import torch

from cfengine.embed import Format, Policy
from cfengine.embed.device import convert
from tests.embed.standin import reader_beside
from tests.scheduler.test_graphs import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def engine(toy_engine):
    return toy_engine(SMALL, device="cuda", dtype=torch.bfloat16)


def test_frames_are_those_of_a_session_on_the_host(engine):
    with engine.session("a b", seed=3) as session:
        expected = [frame.pixels for _ in range(8) for frame in session.next_chunk()]
    with engine.session("a b", seed=3, frames="device") as session:
        frames = [frame.pixels for _ in range(8) for frame in session.next_chunk()]
    assert all(frame.device.type == "cuda" for frame in frames)
    assert all(np.array_equal(one.cpu().numpy(), two) for one, two in zip(frames, expected, strict=True))


def test_memory_of_frames_that_were_let_go_is_used_again(engine):
    """A consumer that reads each frame late, in its own stream, sees it whole; and nothing grows."""
    with engine.session("a", seed=1) as session:
        expected = [frame.pixels.astype(np.int64).sum() for _ in range(30) for frame in session.next_chunk()]
    sums, own, taken = [], torch.cuda.Stream(), []
    with engine.session("a", seed=1, frames="device") as session, torch.cuda.stream(own):
        for _ in range(30):
            frames = session.next_chunk()
            torch.cuda._sleep(20_000_000)  # longer than the next chunk takes to overwrite what is free
            sums += [frame.pixels.to(torch.int64).sum() for frame in frames]
            del frames
            taken.append(torch.cuda.memory_allocated())
        assert [int(each) for each in sums] == expected
    assert taken[-1] <= taken[9] + (1 << 20)


@pytest.mark.parametrize("format", list(Format))
def test_a_session_into_a_ring_of_device_memory(engine, format):
    pytest.importorskip("cuda.bindings.driver", reason="device memory needs cuda-bindings")
    name, seen, done = f"test-{uuid.uuid4().hex[:8]}", [], []
    with engine.session("a", seed=5) as session:
        expected = [frame.pixels for _ in range(2) for frame in session.next_chunk()]
    about = {"seed": 5, "num_frames": 21, "format": format.name.lower(), "memory": "opaque_fd"}
    thread = threading.Thread(target=lambda: done.append(engine.publish("a", name, **about)))
    thread.start()
    reader = reader_beside(thread, name)
    with reader, reader.device_memory() as handle, handle.map() as mapped:
        while len(seen) < 21:
            with reader.acquire(Policy.NEXT, timeout=30) as frame:
                seen.append([plane.cpu() for plane in frame.planes_in(mapped.bytes())])
        thread.join()
    for planes, pixels in zip(seen, expected, strict=True):
        wanted = tuple(torch.zeros_like(plane) for plane in planes)
        convert(torch.from_numpy(pixels), wanted)
        assert all(torch.equal(one, two) for one, two in zip(planes, wanted, strict=True))
    assert done[0].frames == 21
