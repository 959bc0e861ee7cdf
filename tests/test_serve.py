"""A session in a frame ring, read by the C client; and what actions make of prompts."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
import uuid

import numpy as np
import pytest

from cfengine import Engine
from cfengine.embed import (
    ActionEvent,
    Format,
    PauseEvent,
    Policy,
    PromptEvent,
    Reader,
    ResetEvent,
    ResumeEvent,
    Ring,
    State,
    now_ns,
)
from cfengine.errors import ConfigError
from cfengine.serve import Publisher
from cfengine.steering import steered

EVENTS = ActionEvent(9, 1.0), ActionEvent(1, -1.0), PromptEvent("night, hold")  # the first means nothing here

pytestmark = [pytest.mark.cpu, pytest.mark.embed]


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny-world", threads=1) as made:
        yield made


@pytest.mark.parametrize(
    ("prompt", "turn", "expected"),
    [
        ("pan right over a desert at sunset", -1, "pan left, a desert at sunset"),
        ("a desert, panning to the left, fog", 0.5, "pan right, a desert, fog"),
        ("hold, snow", 1, "pan right, snow"),
        ("pan right", 0, "hold"),
        ("turn left over holdings of a panda", 0, "hold, holdings of a panda"),
    ],
)
def test_a_turn_changes_the_words_of_the_camera_alone(prompt: str, turn: float, expected: str) -> None:
    assert steered(prompt, turn) == expected


def test_frames_events_and_counts(engine) -> None:
    """A reader gets the session's own frames in order; what it pushes shows, with the ring's numbers."""
    name, seen = f"test-{uuid.uuid4().hex[:8]}", []
    expected = [frame.pixels for frame in engine.stream("pan right, meadow", seed=3, num_frames=21)]
    with engine.session("pan right, meadow", seed=3) as session, Ring(name, 96, 64, fps=16, slots=64) as ring:
        publisher, done, stop = Publisher(session, ring, adapt=False), [], threading.Event()
        thread = threading.Thread(target=lambda: done.append(publisher.run(stop=stop.is_set)))
        with Reader(name) as reader:
            thread.start()
            try:
                while len(seen) < 21:
                    with reader.acquire(policy=Policy.NEXT, timeout=10) as frame:
                        seen.append((frame.id, frame.pts_ns, frame.planes[0][..., :3].copy()))
                numbers = [reader.push(event) for event in EVENTS]
                last = None
                while last is None or last[0] < numbers[-1]:
                    with reader.acquire(policy=Policy.NEXT, timeout=10) as frame:
                        last = frame.last_event_id, frame.applied_at_chunk, frame.chunk
                assert last[1] == last[2] > 1
                reader.push(PauseEvent())
                while reader.state().state is not State.PAUSED:
                    pass
                reader.push(ResetEvent())
                reader.push(ResumeEvent())
                cut = False
                while not cut:
                    with reader.acquire(policy=Policy.NEXT, timeout=10) as frame:
                        cut, again, chunk = bool(frame.flags & 2), frame.planes[0][..., :3].copy(), frame.chunk
            finally:
                stop.set()
                thread.join()
    assert [number for number, _, _ in seen] == list(range(1, 22))
    assert all(map(np.array_equal, (pixels for *_, pixels in seen), expected))
    steps = np.diff([pts for _, pts, _ in seen])
    assert np.all(steps > 0) and abs(np.median(steps) / 62.5e6 - 1) < 1e-4  # a sixteenth of a second
    assert np.array_equal(again, expected[0]) and chunk > last[2], "reset: the same stream, under numbers that go on"
    assert (done[0].events, done[0].refused, done[0].failed) == (6, 1, 0)


def test_a_short_pause_keeps_times_in_order_and_the_end_is_seen(engine) -> None:
    """Pause and resume at once, while frames of the future are out; then wait until the last one is over."""
    seen: list[int] = []

    class Loud(Ring):
        def publish(self, pixels, **about):
            seen.append(about["pts_ns"])
            return super().publish(pixels, **about)

    with engine.session("hold, desert") as session, Loud(f"test-{uuid.uuid4().hex[:8]}", 96, 64) as ring:
        publisher = Publisher(session, ring)
        publisher._next = now_ns() * 1e-9
        publisher._chunk(None)
        for event in (PauseEvent(id=1), ResumeEvent(id=2)):
            publisher._hear(event)
        publisher._chunk(None)
        assert np.all(np.diff(seen) > 0)
        publisher = Publisher(session, ring)
        publisher.run(num_frames=9)
        assert now_ns() >= seen[-1] + 62_000_000


def test_a_pause_of_any_length_keeps_a_bounded_record(engine) -> None:
    """What a session refuses meanwhile is not kept one by one, and the first frame afterwards knows the newest."""
    known = []

    class Loud(Ring):
        def publish(self, pixels, **about):
            known.append(about["last_event_id"])
            return super().publish(pixels, **about)

    with engine.session("hold, desert") as session, Loud(f"test-{uuid.uuid4().hex[:8]}", 96, 64) as ring:
        publisher, numbers = Publisher(session, ring), itertools.count(1)
        publisher._next = now_ns() * 1e-9
        for _ in range(1500):
            publisher._hear(ActionEvent(9, 1.0, id=next(numbers)))  # means nothing
        for _ in range(3):
            publisher._hear(PromptEvent("hold, snow", id=next(numbers)))
        for _ in range(1500):
            publisher._hear(PauseEvent(id=next(numbers)))
        assert len(publisher._told) <= 2 * 4
        while session._director.last_event_id < 3:
            publisher._chunk(None)
        assert known[-1] == next(numbers) - 1 and not publisher._told


def test_chunks_that_come_too_late_are_made_with_less_effort(toy_engine, monkeypatch) -> None:
    """At 240 frames a second a chunk lasts 50 ms; these take 65 ms at the least, at every level."""
    config = toy_engine().config
    toy = toy_engine(dataclasses.replace(config, video=dataclasses.replace(config.video, fps=240)))
    with toy.session("a") as session, Ring(f"test-{uuid.uuid4().hex[:8]}", 48, 32, fps=240) as ring:
        plain = session.next_chunk

        def slow():
            time.sleep(0.12 * session.efforts[session.effort])
            return plain()

        monkeypatch.setattr(session, "next_chunk", slow)
        done = Publisher(session, ring).run(num_frames=9 + 7 * 12)
        assert (done.chunks, done.late, done.reduced, session.effort) == (8, 7, 6, 3)


def test_an_engine_publishes_and_says_what_cannot_be(engine) -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    done = engine.publish("hold, desert", name, num_frames=12, format="nv12")
    assert (done.frames, done.chunks) == (12, 2)
    with pytest.raises(ConfigError, match="rgba8, nv12"):
        engine.publish("hold, desert", name, format="jpeg")
    assert Format.NV12 == 2
