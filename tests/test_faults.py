"""Consumers that stop, die or run out of disk: their own session, or nobody, is the worse for it."""

from __future__ import annotations

import dataclasses
import re
import resource
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from statistics import median

import av
import numpy as np
import pytest
import torch

from cfengine import Engine
from cfengine.config import MemoryConfig
from cfengine.embed import ActionEvent, Policy, PromptEvent, Reader, Ring, State
from cfengine.errors import CFEngineError, OutputError, PromptError
from cfengine.playout import Playout
from cfengine.serve import Publisher
from cfengine.video import VideoWriter

pytestmark = pytest.mark.cpu

SMALL = MemoryConfig(slow=3)
HOLDS = """
import sys, time
from cfengine.embed import Policy, Reader
with Reader(sys.argv[1]) as reader:
    frame = reader.acquire(policy=Policy.NEXT, timeout=60)
    print(frame.id, flush=True)
    time.sleep(600)
"""


def pixels(frames) -> bytes:
    return b"".join(frame.pixels.tobytes() for frame in frames)


def chunks(session, count: int) -> list[bytes]:
    return [pixels(session.next_chunk()) for _ in range(count)]


@pytest.fixture
def engine(toy_engine):
    """A toy whose video has 240 frames a second, so that nobody waits for its clock."""
    made = toy_engine(memory=SMALL)
    return toy_engine(dataclasses.replace(made.config, video=dataclasses.replace(made.config.video, fps=240)))


@contextmanager
def published(session, *, stop_after: int):
    """A session in a ring of 8 slots, run by a thread until it has put out so many frames; -> (name, what it said)."""
    video, name = session.config.video, f"test-{uuid.uuid4().hex[:8]}"
    done, said, fault = [], [], []

    def run(ring) -> None:
        try:
            done.append(Publisher(session, ring, say=said.append).run(num_frames=stop_after))
        except BaseException as error:
            fault.append(error)

    with Ring(name, video.width, video.height, fps=video.fps, slots=8, readers=4) as ring:
        thread = threading.Thread(target=run, args=(ring,))
        thread.start()
        try:
            yield name, said
        finally:
            thread.join(60)
        assert not thread.is_alive() and not fault and done[0].frames == stop_after
        stats = ring.stats()
    assert (stats.published, stats.refused) == (stop_after, 0)


# Consumers of a ring --------------------------------------------------------------------------------------------------


@pytest.mark.embed
def test_a_reader_that_stops_reading_holds_up_nobody(engine, beside_a_healthy_one) -> None:
    """It pins a frame and looks away; the frame stays what it was, and the writer goes round the other slots."""
    with beside_a_healthy_one(engine), engine.session("a", seed=3) as session:
        with published(session, stop_after=400) as (name, _), Reader(name) as reader:
            with reader.acquire(policy=Policy.NEXT, timeout=60) as frame:
                before = frame.planes[0].copy()
                while reader.state().newest_id < 60 and reader.state().state is not State.ERROR:
                    time.sleep(0.001)
                assert np.array_equal(frame.planes[0], before) and frame.id < 60 - 8


@pytest.mark.embed
def test_a_reader_that_is_killed_with_a_frame_in_its_hands_loses_it(engine, beside_a_healthy_one) -> None:
    with beside_a_healthy_one(engine), engine.session("a", seed=3) as session:
        with published(session, stop_after=900) as (name, _):
            child = subprocess.Popen([sys.executable, "-c", HOLDS, name], stdout=subprocess.PIPE, text=True)
            try:
                held = int(child.stdout.readline())
            finally:
                child.kill()
                child.wait()
            with Reader(name) as reader:
                seen = set()
                while reader.state().newest_id < min(900, held + 60):
                    with reader.acquire(policy=Policy.LATEST, timeout=10) as frame:
                        seen.add(frame.id)
                assert max(seen) > held


def until_known(reader: Reader, number: int) -> None:
    """Wait for a frame that knows of an event."""
    known = 0
    while known < number:
        with reader.acquire(policy=Policy.LATEST, timeout=10) as frame:
            known = frame.last_event_id


@pytest.mark.embed
def test_a_text_that_fails_in_the_encoder_leaves_no_number_pending(engine, monkeypatch, beside_a_healthy_one) -> None:
    """A frame passes its number, it is counted and told, and a turn of the camera is of the prompt that is shown."""
    encode = engine._prompts._embed

    def broken(prompt: str):
        if "bad" in prompt:
            raise PromptError("no such word")
        return encode(prompt)

    monkeypatch.setattr(engine._prompts, "_embed", broken)
    with beside_a_healthy_one(engine), engine.session("a", seed=3) as session:
        with published(session, stop_after=900) as (name, said), Reader(name) as reader:
            number = reader.push(PromptEvent("bad"))
            until_known(reader, number)
            assert session.prompt == "a"
            until_known(reader, reader.push(ActionEvent(1, 1.0)))
        assert session.prompt == "pan right, a"
    assert len(said) == 1 and f"event {number} of the ring failed" in said[0] and "no such word" in said[0]


def test_looking_for_what_is_not_finite_costs_next_to_nothing() -> None:
    """Less than 0.5 % of a chunk; medians of a few, on whatever else the machine does."""
    with Engine.from_pretrained("tiny-world", threads=1) as small, small.session("hold, desert") as session:
        chunk = median(timed(session.next_chunk) for _ in range(5))
        look = median(timed(lambda: bool(torch.isfinite(session.latents).all())) for _ in range(50))
    assert look < 0.005 * chunk


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# A display, files -----------------------------------------------------------------------------------------------------


def test_a_display_that_stops_asking_leaves_a_bounded_lead(engine, beside_a_healthy_one) -> None:
    with beside_a_healthy_one(engine), engine.session("a", seed=3) as session:
        with Playout(session, fps=240, adapt=False) as play:
            while play.at() is None:
                time.sleep(0.001)
            with engine.session("d", seed=1) as other:
                chunks(other, 6)
            assert play.stats().ready <= 9 + 12 and session._chunks <= 3
            play.resume()
            end = time.monotonic() + 60
            while play.at().frame.timings.chunk < 3:  # it goes on where it was
                assert time.monotonic() < end
                time.sleep(0.001)


def test_what_a_session_raises_reaches_its_display_once(engine, monkeypatch, beside_a_healthy_one) -> None:
    with beside_a_healthy_one(engine), engine.session("a", seed=3) as session:
        session.next_chunk()
        session._lane._decoders[0].decode = lambda latents: 1 / 0
        with Playout(session, fps=240) as play:
            play._thread.join(60)
            with pytest.raises(CFEngineError, match="ZeroDivisionError"):
                play.at()
            assert play.at() is None and session.closed


@contextmanager
def full_disk(limit: int):
    """No file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_video_on_a_full_disk_plays_as_far_as_it_goes(engine, tmp_path, beside_a_healthy_one) -> None:
    with beside_a_healthy_one(engine), engine.session("a", seed=3) as session:
        writer = VideoWriter(tmp_path / "a.mp4", fps=16, scale=4, record=None)
        with full_disk(60_000):
            with pytest.raises(OutputError, match="free space") as caught:
                for frame in session.frames(400):
                    writer.write(frame.pixels)
            with suppress(OutputError):
                writer.close()
        (kept,) = re.findall(r"failed at frame \d+ .* and (\d+) frames are in it", str(caught.value))
        with av.open(str(tmp_path / "a.mp4")) as file:
            assert sum(1 for _ in file.decode(video=0)) == int(kept) >= 16
        session.next_chunk()  # the session itself is well


def test_a_snapshot_on_a_full_disk_is_a_sentence_and_leaves_nothing(engine, tmp_path, beside_a_healthy_one) -> None:
    with beside_a_healthy_one(engine), engine.session("a", seed=3) as session:
        session.next_chunk()
        snapshot = session.snapshot()
        with (
            full_disk(10_000),
            pytest.raises(OutputError, match=r"snapshot of \d+ bytes cannot be written.*free space"),
        ):
            snapshot.save(tmp_path / "s")
        assert not list(tmp_path.iterdir())
        expected = chunks(session, 1)
        snapshot.save(tmp_path / "s")
        with engine.resume(type(snapshot).load(tmp_path / "s")) as again:
            assert chunks(again, 1) == expected
