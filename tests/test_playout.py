"""The playout clock: a fake source whose chunks the test lets out, and a fake clock."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from cfengine.errors import ConfigError, FaultError, PromptError
from cfengine.playout import UNTOLD, Governor, Playout
from cfengine.types import ChunkTimings, Frame

pytestmark = pytest.mark.cpu


class Source:
    """Chunks of four frames, each as soon as the test allows it."""

    efforts, effort = (1.0,), 0

    def __init__(self) -> None:
        self.made, self.event, self.cut = 0, 0, False
        self.errors: list[Exception] = []  # each in place of a chunk
        self.allowed, self.waiting = threading.Semaphore(0), threading.Semaphore(0)

    def next_chunk(self) -> list[Frame]:
        self.waiting.release()
        self.allowed.acquire()
        if self.errors:
            raise self.errors.pop(0)
        timings, first = ChunkTimings(chunk=self.made, denoise=0.0, decode=0.0), 4 * self.made
        self.made += 1
        pixels = np.zeros((1, 1, 3), np.uint8)
        return [Frame(pixels, first + i, 0.0, timings, self.event, None, cut=self.cut and i == 0) for i in range(4)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def source():
    made = Source()
    yield made
    made.allowed.release(1000)  # a thread that waits for a chunk can end


def let(source: Source, play: Playout, chunks: int = 1) -> None:
    """Let chunks out, and wait until they are queued."""
    for _ in range(chunks):
        before = source.made
        source.allowed.release()
        while source.made == before:
            time.sleep(0.001)
    until(lambda: play.stats().ready > 0)


def until(what, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def indices(play: Playout, clock: Clock, steps: int, by: float) -> list[int | None]:
    seen = []
    for _ in range(steps):
        shown = play.at()
        seen.append(shown and shown.frame.index)
        clock.now += by
    return seen


def test_frames_come_at_their_rate_whatever_the_display_does(source) -> None:
    """Ten frames a second on a display of 25: each is shown for two or three looks, and none is missed."""
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        assert play.at() is None
        let(source, play)
        assert indices(play, clock, 8, 0.04) == [0, 0, 0, 1, 1, 2, 2, 2]
        stats = play.stats()
        assert (stats.shown, stats.missed, stats.dropped) == (3, 0, 0)


def test_it_makes_no_more_than_one_chunk_ahead(source) -> None:
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        let(source, play)
        time.sleep(0.05)
        assert source.waiting.acquire(timeout=1) and not source.waiting.acquire(blocking=False)
        play.at()  # the first frame is shown: the chunk after it may be made
        assert source.waiting.acquire(timeout=5)
        let(source, play)
        time.sleep(0.05)
        assert not source.waiting.acquire(blocking=False) and play.stats().ready == 7


@pytest.mark.parametrize(("late", "next_frame", "dropped"), [("repeat", 4, 0), ("drop", 6, 2)])
def test_a_late_chunk_is_waited_for_or_left_out(source, late: str, next_frame: int, dropped: int) -> None:
    clock = Clock()
    with Playout(source, fps=10, late=late, clock=clock) as play:
        let(source, play)
        assert indices(play, clock, 4, 0.1) == [0, 1, 2, 3]
        first, again = play.at(), play.at()
        assert first.repeated and again.repeated and first.frame.index == 3
        clock.now += 0.25  # two frames and a half too late
        let(source, play)
        shown = play.at()
        assert (shown.frame.index, shown.repeated, shown.cut) == (next_frame, False, dropped > 0)
        stats = play.stats()
        assert (stats.missed, stats.dropped) == (1, dropped) and stats.stalled == pytest.approx(0.25)


def test_after_a_pause_no_frame_is_left_out_or_missed(source) -> None:
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        let(source, play)
        assert play.at().frame.index == 0
        clock.now += 60
        play.resume()
        assert indices(play, clock, 3, 0.1) == [1, 2, 3]
        stats = play.stats()
        assert (stats.missed, stats.dropped, stats.stalled) == (0, 0, 0)


def test_what_an_event_changed_is_shown_at_once(source) -> None:
    """Frames from before it that are ready are left out, and the picture says that it jumps."""
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        let(source, play)
        assert play.at().frame.index == 0
        source.event = 1
        let(source, play)
        clock.now += 0.1
        shown = play.at()
        assert shown.frame.index == 4 and shown.cut and play.stats().dropped == 3
        clock.now += 0.1
        assert not play.at().cut


def test_a_frame_that_follows_nothing_is_a_cut(source) -> None:
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        let(source, play)
        source.cut = True
        assert [play.at().cut for _ in range(2)] == [False, False]
        let(source, play)
        cuts = []
        for _ in range(6):
            clock.now += 0.1
            cuts.append(play.at().cut)
        assert cuts == [False, False, False, True, False, False] and play.stats().dropped == 0


def test_what_the_source_raises_reaches_the_display_after_the_last_frame(source) -> None:
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        let(source, play)
        source.errors = [ValueError("broken")]
        source.allowed.release()
        assert indices(play, clock, 4, 0.1) == [0, 1, 2, 3]
        until(lambda: not play._thread.is_alive())
        with pytest.raises(ValueError, match="broken"):
            play.at()
        assert play.at().repeated, "it is raised once"


def dropped(number: int) -> PromptError:
    """What a session raises of an event that cannot be; it goes on without."""
    error = PromptError(f"event {number} is dropped")
    error.event_id = number
    return error


def test_an_event_that_fails_is_told_once_in_its_place_and_chunks_go_on(source) -> None:
    """The frame due then is shown when it is asked for again: nothing is missed."""
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        let(source, play)
        assert play.at().frame.index == 0
        source.errors = [dropped(1), dropped(2)]
        source.allowed.release(2)
        let(source, play)
        clock.now += 0.1
        assert indices(play, clock, 3, 0.1) == [1, 2, 3]
        for number in (1, 2):
            with pytest.raises(PromptError, match=f"event {number} is dropped"):
                play.at()
        assert indices(play, clock, 4, 0.1) == [4, 5, 6, 7]
        stats = play.stats()
        assert (stats.shown, stats.missed, stats.dropped, stats.stalled) == (8, 0, 0, 0)


def test_an_error_is_told_though_frames_before_it_are_left_out(source) -> None:
    """What an event changed is shown at once, but an event that failed before it is not passed over."""
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        let(source, play)
        assert play.at().frame.index == 0
        source.errors, source.event = [dropped(1)], 2
        source.allowed.release()
        let(source, play)
        clock.now += 0.1
        with pytest.raises(PromptError, match="event 1 is dropped"):
            play.at()
        shown = play.at()
        assert shown.frame.index == 4 and shown.cut and play.stats().dropped == 3


def test_an_error_before_the_first_frame_is_told_and_another_ends_it(source) -> None:
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        source.errors = [dropped(1), FaultError("the decoder failed", "decode")]
        source.allowed.release(2)
        until(lambda: not play._thread.is_alive())
        with pytest.raises(PromptError, match="event 1"):
            play.at()
        with pytest.raises(FaultError, match="the decoder"):
            play.at()
        assert play.at() is None and play.stats().ready == 0


def test_what_nobody_was_told_is_the_callers_at_the_end(source) -> None:
    play = Playout(source, fps=10, clock=Clock()).__enter__()
    source.errors = [dropped(1)]
    source.allowed.release()
    let(source, play)
    assert [error.event_id for error in play.close()] == [1]


def test_errors_wait_for_a_display_as_chunks_do(source) -> None:
    clock = Clock()
    with Playout(source, fps=10, clock=clock) as play:
        source.errors = [dropped(number) for number in range(UNTOLD + 9)]
        source.allowed.release(1000)
        until(lambda: len(source.errors) == 9)
        time.sleep(0.05)
        assert len(source.errors) == 9 and not source.made
        for _ in range(UNTOLD + 9):
            until(lambda: play._ready)
            with pytest.raises(PromptError):
                play.at()
        until(lambda: play.stats().ready)
        assert play.at().frame.index == 0


def test_effort_goes_down_when_chunks_are_late_and_comes_back(source) -> None:
    governor = Governor([5, 4, 3])
    assert [governor.saw(1.1, 1.0) for _ in range(6)] == [0, 1, 1, 2, 2, 2]
    # at 3 of 5, half of the time: 0.67 at the level above would fit, eight times in a row
    assert [governor.saw(0.5, 1.0) for _ in range(9)] == [2] * 7 + [1, 1]
    assert [governor.saw(0.7, 1.0) for _ in range(20)] == [1] * 20, "0.875 of the time leaves too little room"
    assert [governor.saw(1.1, 1.0), governor.saw(0.9, 1.0), governor.saw(1.1, 1.0)] == [1, 1, 1], "not in a row"
    assert Governor([5, 4, 3], level=2).saw(0.9, 1.0) == 2


class Loaded(Source):
    """Takes what its machine takes: `load` seconds at full effort, of a clock that only it moves."""

    efforts = (1.0, 0.8, 0.6)

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.load, self.levels = clock, 0.2, []

    def next_chunk(self) -> list[Frame]:
        frames = super().next_chunk()
        self.clock.now += self.load * self.efforts[self.effort]
        self.levels.append(self.effort)
        return frames


@pytest.mark.parametrize("adapt", [True, False])
def test_a_source_that_cannot_keep_up_degrades_in_order_and_comes_back(adapt: bool) -> None:
    """Chunks of 0.4 s. A load of 0.6 s fits at 0.6 of the effort alone; 0.2 s fits at all of it."""
    clock = Clock()
    source = Loaded(clock)
    with Playout(source, fps=10, lead=30, adapt=adapt, clock=clock) as play:
        for chunk in range(30):
            source.load = 0.6 if 2 <= chunk < 8 else 0.2
            let(source, play)
            until(lambda chunk=chunk: play.stats().ready == 4 * (chunk + 1))
        assert play.stats().level == source.effort == 0  # a lead of 30 chunks is made: the thread waits
    down = [0] * 4 + [1] * 2 + [2] * 2
    assert source.levels[:30] == (down + [2] * 8 + [1] * 8 + [0] * 6 if adapt else [0] * 30)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"late": "wait"}, "repeat, drop"), ({"fps": 0}, "above 0"), ({"lead": 0}, "at least 1 chunk")],
)
def test_what_cannot_be_is_said(source, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Playout(source, **{"fps": 10, **options})
    with pytest.raises(ConfigError, match="lower than the one before"):
        Governor([3, 3])
