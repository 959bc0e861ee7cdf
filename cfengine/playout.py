"""A clock between a session, which makes chunks, and a display, which wants one frame now.

A thread makes chunks ahead of what is shown, and not further than `lead`: what a user does reaches the picture only
after the frames that are made already. The display asks for the frame of a time and never waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cfengine.errors import CFEngineError, ConfigError
from cfengine.types import Frame

LATE = ("repeat", "drop")  # what happens to frames that were not there in time
UNTOLD = 16  # errors that wait for a display which does not ask; the source then waits too


class Source(Protocol):
    """What makes frames; a `Session` is one.

    efforts: relative costs of a chunk, full effort first      effort: place in them of the chunks to come
    """

    efforts: Sequence[float]
    effort: int

    def next_chunk(self) -> list[Frame]:
        """Frames of the next chunk, in order. An error with an `event_id` is of that event alone, which is dropped."""
        ...


@dataclass(frozen=True)
class Shown:
    """What a display shows.

    due: when it was meant to be seen, in seconds of the clock      repeated: a later frame is due and not there yet
    cut: it does not follow the one before: frames were left out between them, or the session began anew
    """

    frame: Frame
    due: float
    repeated: bool = False
    cut: bool = False


@dataclass(frozen=True)
class PlayoutStats:
    """Counts since the beginning.

    shown: different frames      missed: times that a frame was due and not there      dropped: frames never shown
    stalled: seconds for which the last frame stood in for one that was due
    ready: frames that wait      level: of effort that the next chunk is made with, 0 is full
    """

    shown: int
    missed: int
    dropped: int
    stalled: float
    ready: int
    level: int


class Governor:
    """When to spend less on a chunk, and when to come back: by what chunks take against what they show.

    costs: relative cost of a chunk at each level, full effort first      level: to begin at
    """

    PATIENCE = 2  # chunks in a row that take too long before effort goes down
    RECOVERY = 8  # chunks in a row that would have fitted at the level above before effort goes up
    HEADROOM = 0.85  # share of its time that a chunk may take at the level that is gone back to

    def __init__(self, costs: Sequence[float], level: int = 0) -> None:
        if not costs or any(later >= earlier for earlier, later in zip(costs, costs[1:], strict=False)):
            raise ConfigError(f"costs of effort are {list(costs)}; give at least one, each lower than the one before")
        self.costs, self.level = list(costs), level
        self._slow = self._fast = 0

    def saw(self, took: float, lasts: float) -> int:
        """Count a chunk that took `took` seconds and shows for `lasts`; returns the level for the next one."""
        self._slow = self._slow + 1 if took > lasts else 0
        above = self.costs[self.level - 1] / self.costs[self.level] if self.level else float("inf")
        self._fast = self._fast + 1 if took * above <= self.HEADROOM * lasts else 0
        if self._slow >= self.PATIENCE and self.level + 1 < len(self.costs):
            self._move(1)
        elif self._fast >= self.RECOVERY:
            self._move(-1)
        return self.level

    def _move(self, by: int) -> None:
        self.level += by
        self._slow = self._fast = 0


class Playout:
    """Frames of a source in time, made ahead by a thread of its own.

    with Playout(session) as play:
        while running:
            shown = play.at(next_display_time)

    A source that cannot keep up is set to levels of less effort, one after the other, and back; see `Governor`. `at`,
    `resume` and `stats` may be called from any one thread while the playout runs; the source belongs to the playout's.
    An error is told to the display. One that is about an event (`CFEngineError.event_id`) has cost that event alone and
    chunks go on; after any other no more are made, and the last frame is repeated.
    """

    def __init__(
        self,
        source: Source,
        *,
        fps: float,
        lead: int = 1,
        late: str = "repeat",
        adapt: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """fps: frames a second of the clock

        lead: chunks that may be ready or in the making behind the one that is shown
        late: "repeat" holds the last frame and the clock waits for the next; "drop" leaves out what came too late
        adapt: whether the effort of the source follows what it takes, else it stays as it is
        """
        if late not in LATE:
            raise ConfigError(f"late is {late!r}; choose one of {', '.join(LATE)}")
        if not fps > 0 or lead < 1:
            raise ConfigError(f"fps is {fps} and lead {lead}; give a rate above 0 and a lead of at least 1 chunk")
        self._source, self._period, self._lead, self._late, self._clock = source, 1 / fps, lead, late, clock
        self._governor, self._adapt = Governor(source.efforts, source.effort), adapt
        self._ready: deque[Frame | BaseException] = deque()  # in the order in which a display is told
        self._current: Frame | None = None
        self._due = self._current_due = 0.0  # of the first frame that is ready or to come, and of the one shown
        self._starved_at: float | None = None
        self._cut = False
        self._shown = self._missed = self._dropped = 0
        self._stalled = 0.0
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="cfengine playout", daemon=True)

    # the display's side

    def at(self, when: float | None = None) -> Shown | None:
        """The frame to show at a time of the clock (now, if None); None before the first is there. Never waits.

        Times may not go back. Raises what the source raised, each error once, when what it had made before has been
        shown and the frame after that is due; asked again with the same time, it goes on.
        """
        with self._wake:
            when = self._clock() if when is None else when
            if self._current is None:
                if not self._ready:
                    return None
                self._due = when
            repeated = self._advance(when)
            cut, self._cut = self._cut, False
            self._wake.notify_all()
            return Shown(self._current, self._current_due, repeated, cut)

    def resume(self, when: float | None = None) -> None:
        """Go on after a pause in which nobody asked for frames: the next is due now, or at a time of the clock."""
        with self._wake:
            self._due = max(self._due, self._clock() if when is None else when)
            self._starved_at = None

    def _advance(self, when: float) -> bool:
        """Go on to the last frame that is due; whether one is due that is not there. Raises an error that is due."""
        moved = 0
        while self._ready and self._due <= when:
            if isinstance(self._ready[0], BaseException):
                if moved:  # the frame before it is shown first
                    break
                self._wake.notify_all()
                raise self._ready.popleft()
            self._current, self._current_due = self._ready.popleft(), self._due
            self._due += self._period
            self._cut |= self._current.cut
            moved += 1
        if moved:
            self._shown += 1
            self._dropped += moved - 1
            self._cut |= moved > 1
        if self._ready or when < self._due:
            return False
        if self._starved_at is None:
            self._starved_at = self._due
            self._missed += 1
        return True

    def stats(self) -> PlayoutStats:
        """Counts so far."""
        with self._wake:
            ready = len(self._frames())
            return PlayoutStats(self._shown, self._missed, self._dropped, self._stalled, ready, self._governor.level)

    # the thread that makes chunks

    def _run(self) -> None:
        on = True
        while on:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or self._has_room())
                if self._stopped:
                    return
            try:
                self._make()
            except BaseException as error:  # the display is told; this thread has nobody to tell
                with self._wake:
                    self._ready.append(error)
                on = isinstance(error, CFEngineError) and error.event_id is not None

    def _make(self) -> None:
        began = self._clock()
        frames = self._source.next_chunk()
        if self._adapt:
            self._source.effort = self._governor.saw(self._clock() - began, len(frames) * self._period)
        with self._wake:
            self._accept(frames)

    def _frames(self) -> list[Frame]:
        """What is ready to be shown."""
        return [item for item in self._ready if isinstance(item, Frame)]

    def _has_room(self) -> bool:
        """Whether another chunk may be made: fewer than `lead` wait of which nothing was shown yet."""
        frames = self._frames()
        shown = self._current.timings.chunk if self._current else None
        waiting = len({frame.timings.chunk for frame in frames} - {shown})
        return waiting < self._lead and len(self._ready) - len(frames) < UNTOLD

    def _accept(self, frames: list[Frame]) -> None:
        """Queue a chunk. If an event shows in it for the first time, frames that are ready from before the event go."""
        ready = self._frames()
        newest = ready[-1] if ready else self._current
        if newest is not None and frames[0].last_event_id != newest.last_event_id:
            self._dropped += len(ready)
            self._cut |= bool(ready)
            self._ready = deque(item for item in self._ready if not isinstance(item, Frame))
        self._ready.extend(frames)
        if self._starved_at is not None:
            now = self._clock()
            self._stalled += max(0.0, now - self._starved_at)
            self._starved_at = None
            if self._late == "repeat":
                self._due = max(self._due, now)

    def __enter__(self) -> Playout:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> list[BaseException]:
        """Stop once the chunk in the making is done; the source is the caller's again. Harmless twice.

        -> errors that the display was not told
        """
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        return [item for item in self._ready if isinstance(item, BaseException)]
