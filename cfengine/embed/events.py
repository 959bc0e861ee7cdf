"""What a game tells the engine through the ring."""

from __future__ import annotations

from dataclasses import dataclass

PROMPT, ACTION, POSE, PAUSE, RESUME, RESET = range(1, 7)  # CF_EVENT_*


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    id: 1, 2, 3, ... over all programs, in the life of one ring; 0 before it is pushed
    pushed_ns: when it was pushed, on the clock of `now_ns`
    """

    id: int = 0
    pushed_ns: int = 0


@dataclass(frozen=True)
class PromptEvent(Event):
    """Show something else. text: up to 4,000 bytes of UTF-8."""

    text: str


@dataclass(frozen=True)
class ActionEvent(Event):
    """A key or an axis. code: what the model calls it      value: 1 pressed, 0 released, or a position"""

    code: int
    value: float


@dataclass(frozen=True)
class PoseEvent(Event):
    """Where the viewer is. position: metres right, up, back      orientation: unit quaternion x, y, z, w
    time_ns: when that holds, on the clock of `now_ns`
    """

    position: tuple[float, float, float]
    orientation: tuple[float, float, float, float]
    time_ns: int = 0


@dataclass(frozen=True)
class PauseEvent(Event):
    """Hold the picture."""


@dataclass(frozen=True)
class ResumeEvent(Event):
    """Go on."""


@dataclass(frozen=True)
class ResetEvent(Event):
    """Begin again, with nothing remembered."""


_PLAIN = {PAUSE: PauseEvent, RESUME: ResumeEvent, RESET: ResetEvent}
PLAIN_KINDS = {made: kind for kind, made in _PLAIN.items()}


def typed(kind: int, id: int, pushed_ns: int, value) -> Event:
    """Make the event of what `RingWriter.take_events` gives."""
    if kind == PROMPT:
        return PromptEvent(value, id=id, pushed_ns=pushed_ns)
    if kind == ACTION:
        return ActionEvent(*value, id=id, pushed_ns=pushed_ns)
    if kind == POSE:
        return PoseEvent(*value, id=id, pushed_ns=pushed_ns)
    return _PLAIN[kind](id=id, pushed_ns=pushed_ns)
