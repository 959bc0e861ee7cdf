"""The ring from Python: pixels, views, events, states, errors, and the layout as any language may read it."""

from __future__ import annotations

import mmap
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cfengine.embed import (
    ActionEvent,
    Flags,
    Format,
    PauseEvent,
    Policy,
    PoseEvent,
    PromptEvent,
    Reader,
    ResetEvent,
    ResumeEvent,
    Ring,
    State,
    now_ns,
)
from cfengine.errors import RingError

pytestmark = pytest.mark.embed

WIDTH, HEIGHT = 40, 26  # rows of 160 bytes: not as wide as their stride


def pixels(seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, channels), np.uint8)


@pytest.fixture
def ring(ring_name):
    with Ring(ring_name, WIDTH, HEIGHT) as made:
        yield made


@pytest.fixture
def reader(ring):
    with Reader(ring.name) as opened:
        yield opened


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_a_frame_is_read_where_it_lies(ring, reader):
    assert reader.acquire() is None
    before = now_ns()
    assert ring.publish(pixels(), pts_ns=before + 10**10, chunk=4, last_event_id=2, applied_at_chunk=3) == 1
    with reader.acquire() as frame:
        assert (frame.pixels[..., :3] == pixels()).all() and (frame.pixels[..., 3] == 255).all()
        assert not frame.pixels.flags.writeable and not frame.pixels.flags.owndata
        assert (frame.id, frame.chunk, frame.last_event_id, frame.applied_at_chunk) == (1, 4, 2, 3)
        assert frame.flags == Flags.NONE and before <= frame.ready_ns <= now_ns() and frame.pts_ns == before + 10**10
        assert frame.generation == ring.generation == reader.state().generation
    with reader.acquire() as again:
        assert again.id == 1 and again.flags == Flags.REPEATED


@pytest.mark.parametrize(
    "given",
    [
        pixels(1, 4),
        pixels(2)[::-1],
        np.asfortranarray(pixels(3)),
        np.pad(pixels(4), ((0, 0), (8, 8), (0, 0)))[:, 8:-8],
        pixels(5).tolist(),
    ],
    ids=["rgba", "upside-down", "fortran", "cut-out", "list"],
)
def test_every_arrangement_of_pixels(ring, reader, given):
    expected = np.asarray(given)
    if isinstance(given, list):
        with pytest.raises(RingError, match="int64"):
            ring.publish(given)
        given = expected = expected.astype(np.uint8)
    ring.publish(given)
    with reader.acquire() as frame:
        assert (frame.pixels[..., : expected.shape[2]] == expected).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_nv12_is_bt709(ring_name, channels):
    """The formula in float64; half a step of rounding, and 0.01 for coefficients of 16 bits (255 * 3 / 2^17)."""
    rgb = pixels(6, channels)
    rgb[:2, :4, :3] = [[[255] * 3, [0] * 3, [255, 0, 0], [0, 0, 255]]] * 2
    luma = np.array([0.2126, 0.7152, 0.0722])
    r, g, b = np.moveaxis(rgb[..., :3].astype(float), 2, 0)
    y = rgb[..., :3] @ luma
    fours = [c.reshape(HEIGHT // 2, 2, WIDTH // 2, 2).mean((1, 3)) for c in (y, b, r)]
    cb, cr = (
        128 + (c - fours[0]) / (2 * (1 - k)) * 224 / 255 for c, k in zip(fours[1:], (0.0722, 0.2126), strict=True)
    )
    with Ring(ring_name, WIDTH, HEIGHT, format=Format.NV12) as ring, Reader(ring_name) as reader:
        ring.publish(rgb)
        with reader.acquire() as frame:
            assert frame.format is Format.NV12 and frame.planes[1].shape == (HEIGHT // 2, WIDTH // 2, 2)
            assert np.abs(frame.planes[0] - (16 + y * 219 / 255)).max() < 0.51
            assert np.abs(frame.planes[1] - np.stack([cb, cr], 2)).max() < 0.51
            assert frame.planes[0][0, :2].tolist() == [235, 16]


def test_views_outlive_frame_reader_and_ring(ring_name):
    with Ring(ring_name, WIDTH, HEIGHT) as ring, Reader(ring_name) as reader:
        ring.publish(pixels())
        with reader.acquire() as frame:
            view = frame.pixels
        del frame
    with Ring(ring_name, WIDTH, HEIGHT) as ring:  # another object
        ring.publish(pixels(1))
        assert (view[..., :3] == pixels()).all()


def test_wrong_frames(ring):
    for wrong in (pixels()[:-1], pixels().astype(float), pixels()[..., :2], pixels()[0]):
        with pytest.raises(RingError, match="frame of"):
            ring.publish(wrong)
    assert ring.stats().published == 0


# Events and states ----------------------------------------------------------------------------------------------------


def test_events_come_typed_and_in_order(ring, reader):
    pose = PoseEvent((1.0, 2.0, -3.5), (0.0, 0.0, 0.0, 1.0), 99)
    sent = [PromptEvent("Hügel, 空"), ActionEvent(7, -0.25), pose, PauseEvent(), ResumeEvent(), ResetEvent()]
    assert [reader.push(event) for event in sent] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(RingError, match="str is no event"):
        reader.push("a meadow")
    taken = ring.events()
    assert ring.events() == []
    for number, (event, original) in enumerate(zip(taken, sent, strict=True), 1):
        assert event.id == number and 0 < event.pushed_ns <= now_ns()
        assert type(event) is type(original)
        assert {**vars(event), "id": 0, "pushed_ns": 0} == vars(original)


def test_a_full_queue_and_a_long_prompt_are_refused(ring, reader):
    with pytest.raises(RingError, match="4001 bytes, but a ring takes 4000") as raised:
        reader.push(PromptEvent("x" * 4001))
    assert raised.value.result == "CF_ERROR_TOO_LONG"
    for _ in range(64):
        reader.push(PauseEvent())
    with pytest.raises(RingError, match="64 events") as raised:
        reader.push(PauseEvent())
    assert raised.value.result == "CF_ERROR_QUEUE_FULL"
    assert len(ring.events()) == 64 and reader.push(PauseEvent()) == 65


def test_states(ring, reader):
    assert ring.state is State.LOADING
    for state in (State.READY, State.RUNNING, State.PAUSED, State.ERROR):
        ring.state = state
        assert ring.state is reader.state().state is state
    found = reader.state()
    assert (found.width, found.height, found.slots, found.readers, found.fps) == (WIDTH, HEIGHT, 24, 4, 16)
    assert found.writer_alive and found.newest_id == 0
    ring.close()
    assert reader.state().state is State.ENDED and not reader.state().writer_alive


def test_a_silent_writer_is_stalled(ring_name):
    with Ring(ring_name, WIDTH, HEIGHT, stall=0.05, fps=30000 / 1001) as ring, Reader(ring_name) as reader:
        ring.state = State.RUNNING
        assert reader.state().state is State.RUNNING and reader.state().fps == Fraction(30000, 1001)
        time.sleep(0.1)
        assert reader.state().state is State.STALLED
        ring.beat()
        assert reader.state().state is State.RUNNING


def test_a_reader_follows_the_next_ring(ring_name):
    with Ring(ring_name, WIDTH, HEIGHT) as first:
        reader = Reader(ring_name)
        first.publish(pixels())
        held = reader.acquire()
    with Ring(ring_name, 2 * WIDTH, HEIGHT) as second:
        second.publish(np.zeros((HEIGHT, 2 * WIDTH, 3), np.uint8))
        assert (held.pixels[..., :3] == pixels()).all()
        held.release()
        time.sleep(0.12)  # it looks after 0.1 s without a heartbeat
        with reader.acquire(timeout=5) as frame:
            assert frame.flags & Flags.DISCONTINUITY and frame.pixels.shape == (HEIGHT, 2 * WIDTH, 4)
            assert frame.generation == second.generation != first.generation
        assert reader.push(ResetEvent()) == 1 and [event.id for event in second.events()] == [1]
        reader.close()


def test_waiting_and_publishing_threads_meet(ring, reader):
    seen = []

    def read() -> None:
        while len(seen) < 20:
            with reader.acquire(Policy.NEXT, timeout=10) as frame:
                seen.append(frame.id)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(20):
        ring.publish(pixels(number))
        time.sleep(0.002)
    thread.join(10)
    assert seen == list(range(1, 21)) and reader.stats()["frames_skipped"] == 0


# Errors ---------------------------------------------------------------------------------------------------------------


def test_errors_are_sentences_with_a_code(ring_name):
    with pytest.raises(RingError, match=f"there is no ring {ring_name}; start its writer") as raised:
        Reader(ring_name)
    assert raised.value.result == "CF_ERROR_NOT_FOUND"
    with Ring(ring_name, WIDTH, HEIGHT) as ring:
        with pytest.raises(RingError, match="living writer") as raised:
            Ring(ring_name, WIDTH, HEIGHT)
        assert raised.value.result == "CF_ERROR_BUSY"
        ring.publish(pixels())
        with Reader(ring_name) as reader:
            frame = reader.acquire()
            with pytest.raises(RingError, match="frame 1 is held") as raised:
                reader.acquire()
            assert raised.value.result == "CF_ERROR_FRAME_HELD"
            frame.release()
            with pytest.raises(RingError, match="not held"):
                frame.release()
        with pytest.raises(RingError, match="the reader is closed"):
            reader.acquire()
    with pytest.raises(RingError, match="the ring is closed"):
        ring.publish(pixels())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"width": 0}, "width is 0"),
        ({"height": -1}, "height is -1"),
        ({"readers": 17}, "readers is 17 but must be from 1 to 16"),
        ({"slots": 5}, "slots is 5 but must be from 6 to 250"),
        ({"events": 48}, "power of two"),
        ({"fps": 0}, "positive"),
        ({"format": Format.NV12, "width": 41}, "41 x 26 cannot be NV12"),
    ],
)
def test_rings_that_cannot_be(ring_name, wrong, says):
    with pytest.raises(RingError, match=says):
        Ring(ring_name, **{"width": WIDTH, "height": HEIGHT} | wrong)


def test_names_that_cannot_be():
    for name in ("", "a/b", "..", "x" * 65, "a b"):
        with pytest.raises(RingError, match="name"):
            Ring(name, WIDTH, HEIGHT)


def test_without_the_extension_it_says_how_to_build_it(monkeypatch, ring_name):
    import cfengine

    monkeypatch.delattr(cfengine, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "cfengine._C", None)
    with pytest.raises(RingError, match=r"not available .*; build the extension .* pip install -e \."):
        Ring(ring_name, WIDTH, HEIGHT)


def test_a_forked_child_leaves_its_parents_ring_alone(ring_name):
    code = f"""
import os
from cfengine.embed import Reader, Ring
ring = Ring({ring_name!r}, 8, 8)
reader = Reader(ring.name)
if os.fork() == 0:
    reader.close()
    ring.close()
    os._exit(0)
os.wait()
assert ring.stats().readers == 1 and ring.state.name == "LOADING"
Reader(ring.name).close()  # the name is still there
ring.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# The layout -----------------------------------------------------------------------------------------------------------


def test_the_layout_is_the_documented_one(ring, reader):
    """Offsets by hand: what another implementation, in any language, would rely on."""
    ring.publish(pixels(8), pts_ns=123, chunk=5)
    ring.publish(pixels(9), pts_ns=456, chunk=6)
    path = Path("/dev/shm") / f"cfengine.{ring.name}"
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        magic, major, minor, total, generation = struct.unpack_from("<8sIIQQ", memory, 0)
        assert (magic, major, minor, total) == (b"CFRING1\0", 1, 0, len(memory)) and generation == ring.generation
        header, slots, leases, events = struct.unpack_from("<4I", memory, 32)
        assert (header, slots, leases, events) == (512, 24, 4, 64)
        slot_at, frame_at, frame_bytes, lease_at, queue_at = struct.unpack_from("<5Q", memory, 48)
        assert frame_at % 65536 == lease_at % 65536 == 0 and queue_at == lease_at + 64 * leases
        kind, home, width, height, stride, _, chroma = struct.unpack_from("<6IQ", memory, 88)
        assert (kind, home, width, height, stride, chroma) == (1, 1, WIDTH, HEIGHT, 192, 0)
        assert struct.unpack_from("<2I", memory, 120) == (16, 1)
        latest, _, state = struct.unpack_from("<QqI", memory, 320)
        assert latest >> 8 == 2 and state == State.LOADING
        at = slot_at + 128 * (latest & 255)
        assert struct.unpack_from("<Qq", memory, at) == (2, 456) and struct.unpack_from("<Q", memory, at + 24) == (6,)
        rows = np.frombuffer(memory, np.uint8, stride * height, frame_at + frame_bytes * (latest & 255))
        assert (rows.reshape(height, stride)[:, : 4 * width].reshape(height, width, 4)[..., :3] == pixels(9)).all()
        del rows
