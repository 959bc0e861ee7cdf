"""A session played into a frame ring: frames in time for programs of any language, and their events back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from cfengine.embed import (
    ActionEvent,
    Event,
    Flags,
    Format,
    Memory,
    PauseEvent,
    PromptEvent,
    ResetEvent,
    ResumeEvent,
    Ring,
    State,
    now_ns,
)
from cfengine.errors import CFEngineError, ConfigError
from cfengine.events import Prompt, Reset
from cfengine.playout import Governor
from cfengine.session import Session, check_num_frames
from cfengine.steering import TURN, steered
from cfengine.types import Frame

if TYPE_CHECKING:
    from cfengine.engine import Engine

POLL = 0.004  # seconds between two looks at the events while nothing is due
EARLIEST = 0.1  # seconds before its time that a chunk is begun at least


@dataclass(frozen=True)
class Published:
    """Counts of a publisher.

    late: chunks whose first frame came after its time      reduced: chunks made with less than full effort
    refused: events that made no sense      failed: events whose text turned out later to be one that cannot be encoded
    """

    frames: int
    chunks: int
    late: int
    reduced: int
    events: int
    refused: int
    failed: int


def publish(
    engine: Engine,
    prompt: str,
    ring: str,
    *,
    seed: int,
    num_frames: int | None,
    stop: Callable[[], bool],
    say: Callable[[str], None],
    format: str,
    memory: str,
) -> Published:
    """See `Engine.publish`."""
    check_num_frames(num_frames)
    look, home = chosen(Format, "format", format), chosen(Memory, "memory", memory)
    video = engine.config.video
    slots = max(24, 2 * engine.config.memory.chunk_frames * video.temporal_stride)
    with (
        engine.session(prompt, seed=seed, frames="host" if home is Memory.HOST else "device") as session,
        Ring(
            ring, video.width, video.height, fps=video.fps, format=look, slots=slots, memory=home, device=engine.device
        ) as made,
    ):
        return Publisher(session, made, say=say).run(num_frames=num_frames, stop=stop)


def chosen(kind: type[IntEnum], what: str, name: str) -> IntEnum:
    """The member of this name in small letters.  Raises ConfigError."""
    names = {made.name.lower(): made for made in kind}
    if name not in names:
        raise ConfigError(f"unknown {what} {name!r}; choose one of {', '.join(names)}")
    return names[name]


def now() -> float:
    """Seconds on the clock of the ring."""
    return 1e-9 * now_ns()


class Publisher:
    """Makes chunks of a session just before they are to be seen, and puts their frames into a ring.

    A chunk is begun when what is published lasts no longer than twice what the slowest of the last chunks took, so that
    an event waits for as little as possible; never more than `lead` chunks ahead. Where chunks come too late, the clock
    waits for them, and the session goes on with less effort until it keeps up (`Governor`). PROMPT events become
    prompts, ACTION events of code 1 turn the camera, PAUSE, RESUME and RESET do what they say, and others are counted
    as refused. RESET begins anew with the prompt that the session had when this was made, and with its seed.
    """

    def __init__(
        self,
        session: Session,
        ring: Ring,
        *,
        lead: int = 1,
        adapt: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """adapt: whether the session's effort follows what chunks take, else it stays as it is

        say: told one sentence for each event that is refused or fails
        """
        self._session, self._ring, self._lead, self._say = session, ring, lead, say
        self._period = 1 / session.config.video.fps
        self._governor, self._adapt = Governor(session.efforts, session.effort), adapt
        self._prompt = self._first = session.prompt  # the newest that was asked for
        self._prompt_event = 0  # the session's number of that
        self._paused = False
        self._next = 0.0  # when the next frame is to be seen, in seconds of the ring's clock
        self._took: deque[float] = deque([EARLIEST / 2], maxlen=8)
        self._told: deque[tuple[int, int]] = deque()  # events of the ring, and the session's that stand for them
        self._event, self._applied = 0, 0
        self._frames = self._chunks = self._late = self._reduced = self._events = self._refused = self._failed = 0

    def run(self, *, num_frames: int | None = None, stop: Callable[[], bool] = lambda: False) -> Published:
        """Publish until `num_frames` are out and their time is over, or `stop()` says so. Raises what closes the
        session; the ring then says ERROR, else PAUSED or RUNNING as it was.
        """
        self._next = now() + self._ahead()
        self._ring.state = State.RUNNING
        try:
            while not stop() and (num_frames is None or self._frames < num_frames):
                for event in self._ring.events():
                    self._hear(event)
                if self._paused or self._next - now() > self._ahead():
                    self._ring.beat()
                    time.sleep(POLL)
                else:
                    self._chunk(None if num_frames is None else num_frames - self._frames)
            while not stop() and now() < self._next:  # the last frames are still to be seen
                self._ring.beat()
                time.sleep(POLL)
        except BaseException as error:
            self._ring.state = State.ENDED if isinstance(error, KeyboardInterrupt) else State.ERROR
            raise
        events = self._events, self._refused, self._failed
        return Published(self._frames, self._chunks, self._late, self._reduced, *events)

    def _ahead(self) -> float:
        """Seconds before its time that a chunk is begun."""
        config = self._session.config
        chunk = config.memory.chunk_frames * config.video.temporal_stride * self._period
        return min(max(EARLIEST, 2 * max(self._took)), self._lead * chunk)

    def _chunk(self, most: int | None) -> None:
        began = time.monotonic()
        try:
            frames = self._session.next_chunk()
        except CFEngineError as error:
            if self._session.closed:
                raise
            self._fail(error)
            return
        took = time.monotonic() - began
        self._took.append(took)
        if self._adapt:
            self._session.effort = self._governor.saw(took, len(frames) * self._period)
        self._chunks += 1
        self._reduced += frames[0].timings.effort > 0
        if now() > self._next:
            self._late += self._frames > 0
            self._next = now()
        for frame in frames[:most]:
            self._publish(frame)

    def _publish(self, frame: Frame) -> None:
        while self._told and self._told[0][1] <= frame.last_event_id:
            self._event, self._applied = self._told.popleft()[0], frame.timings.chunk
        self._ring.publish(
            frame.pixels,
            pts_ns=round(1e9 * self._next),
            chunk=frame.timings.chunk,
            last_event_id=self._event,
            applied_at_chunk=self._applied,
            flags=Flags.DISCONTINUITY if frame.cut else Flags.NONE,
        )
        self._next += self._period
        self._frames += 1

    def _hear(self, event: Event) -> None:
        """Do what an event of the ring asks for."""
        self._events += 1
        known = self._told[-1][1] if self._told else 0
        if isinstance(event, PromptEvent):
            known = self._show(event.text) or known
        elif isinstance(event, ActionEvent) and event.code == TURN:
            known = self._show(steered(self._prompt, event.value)) or known
        elif isinstance(event, PauseEvent | ResumeEvent):
            if self._paused and isinstance(event, ResumeEvent):
                self._next = max(self._next, now() + self._ahead())  # what is published already keeps its time
            self._paused = isinstance(event, PauseEvent)
            self._ring.state = State.PAUSED if self._paused else State.RUNNING
        elif isinstance(event, ResetEvent):
            known = (self._show(self._first) and self._push(Reset)) or known
        else:
            self._refuse(f"event {event.id} of the ring is {event}; this model takes prompts and action {TURN}")
        if len(self._told) > 1 and self._told[-1][1] == self._told[-2][1] == known:
            self._told.pop()  # shown by the same frame, the later number says it; a pause may last for ever
        self._told.append((event.id, known))

    def _show(self, text: str) -> int:
        """Change the prompt; the session's number of that, 0 where it cannot be."""
        number = self._push(Prompt, text)
        if number:
            self._prompt, self._prompt_event = text, number
        return number

    def _push(self, kind: type, *values: str) -> int:
        """Tell the session of an event; its number there, 0 where it cannot be."""
        try:
            return self._session.push(kind(*values))
        except CFEngineError as error:
            self._refuse(str(error))
            return 0

    def _fail(self, error: CFEngineError) -> None:
        """Pass over an event that the session has dropped, so that nobody waits for its number, and say so."""
        self._failed += 1
        if error.event_id == self._prompt_event:
            self._prompt = self._session.prompt
        names = [str(name) for name, number in self._told if number == error.event_id]
        self._told = deque((name, 0 if number == error.event_id else number) for name, number in self._told)
        self._say(f"event {names[0] if names else 'unknown'} of the ring failed: {error}")

    def _refuse(self, why: str) -> None:
        self._refused += 1
        self._say(why)
