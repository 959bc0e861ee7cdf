"""What the chunks of a session show: its script, and the events that change it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cfengine.config import EngineConfig
from cfengine.errors import CFEngineError, ConfigError, SnapshotError
from cfengine.events import Event, Prompt
from cfengine.memory.policies import flushes
from cfengine.scheduler.prompts import Keys, Mix, PromptCache, finished, mixed, pure, trimmed
from cfengine.scheduler.scenes import Timeline, timeline
from cfengine.types import Receipt

LIMIT = 256  # events that wait: more come from a program that pushes and takes no frames


class Cue(NamedTuple):
    """What a chunk shows."""

    mix: Mix
    prompt: str  # of its scene; where a blend leads
    opens: bool  # a scene begins
    cut: bool  # with a jump of temporal positions


@dataclass(frozen=True)
class Script:
    """What chunks show from chunk `since` on, until another event; origin: what a blend begins with."""

    event: Prompt
    timeline: Timeline
    since: int = 0
    origin: Mix = ()

    def at(self, chunk: int) -> Cue:
        """chunk: counted from the start of the session; one before `since` counts as the first."""
        place = max(0, chunk - self.since)
        number, opens = self.timeline.at(place)
        scene = self.timeline.scenes[number]
        mix = mixed(self.origin, scene.prompt, (place + 1) / self.event.chunks)
        return Cue(mix, scene.prompt, opens, opens and scene.cut)

    def mixes(self, chunk: int) -> list[Mix]:
        """All that chunks from `chunk` on can show."""
        fading = [self.at(k).mix for k in range(max(chunk, self.since), self.since + self.event.chunks - 1)]
        return list(dict.fromkeys([*fading, *(pure(scene.prompt) for scene in self.timeline.scenes)]))


@dataclass
class Waiting:
    """An event that no chunk has shown yet."""

    number: int
    event: Event
    timeline: Timeline
    pushed: float
    at_once: bool  # the next edge takes it, ready or not
    asked: dict[Mix, Future] = field(default_factory=dict)

    def script(self, before: Script, chunk: int) -> Script:
        """What it asks for, were it to count from `chunk` on."""
        return Script(self.event, self.timeline, chunk, trimmed(before.at(chunk).mix))

    def ask(self, prompts: PromptCache, mixes: list[Mix]) -> bool:
        """Have mixes made beside the chunks, and let go of others; returns whether all are there, or failed."""
        self.asked = {mix: self.asked[mix] if mix in self.asked else prompts.ask(mix) for mix in mixes}
        return all(self.asked[mix].done() for mix in mixes)

    def made(self, prompts: PromptCache, mixes: list[Mix]) -> dict[Mix, Keys]:
        """Mixes and their keys and values, waiting for what is not there yet."""
        return {mix: self.asked[mix].result() if mix in self.asked else prompts.now(mix) for mix in mixes}


class Director:
    """Takes events from any thread and puts them into effect between two chunks, in their order.

    An event waits until all keys and values that it can need are made, and those after it wait too, so that a chunk
    never waits for text; but for events pushed to count at once. All methods but `push` are for the one consumer.
    """

    def __init__(self, config: EngineConfig, prompts: PromptCache, prompt: str) -> None:
        """Encodes the first prompt, all its scenes.  Raises PromptError."""
        self._config, self._prompts = config, prompts
        self._lock = threading.Lock()  # guards what `push` changes
        self._waiting: deque[Waiting] = deque()
        self._count = 0
        self.next = 0  # the chunk that the next edge comes before
        self.last_event_id, self.applied_at_chunk = 0, None
        self._flush = self._recache = False
        self._applied: list[tuple[int, float, float]] = []  # of the chunk to come: event, pushed, applied
        began = time.perf_counter()
        self._script = Script(Prompt(prompt), timeline(prompt, config))
        self._keys = {mix: prompts.now(mix) for mix in self._script.mixes(0)}
        self._waited = time.perf_counter() - began  # seconds that callers waited for text since the last chunk

    @property
    def prompt(self) -> str:
        """What the newest chunk shows, or the first will."""
        return self._script.at(self.next - 1).prompt

    def push(self, event: Event, *, at_once: bool) -> int:
        """Take an event; returns its number, 1, 2, ... See `Session.push`."""
        pushed, began = time.monotonic(), time.perf_counter()
        if not isinstance(event, Event):
            raise ConfigError(f"{event!r} is no event; push a Prompt(text, switch)")
        if event.switch == "flush" and not flushes(self._config.memory):
            raise ConfigError(
                f"policy {self._config.memory.policy!r} has no scenes to flush; choose another switch, or a policy "
                "with a window: fifo, sink_window, relative_window"
            )
        scenes = timeline(event.text, self._config)
        for scene in scenes.scenes:
            self._prompts.check(scene.prompt)
        if len(self._waiting) >= LIMIT:
            raise CFEngineError(f"{LIMIT} events wait, and a session takes no more; ask it for chunks between events")
        waiting = Waiting(0, event, scenes, pushed, at_once)
        mixes = waiting.script(self._ahead(), self.next).mixes(self.next)
        if at_once:
            waiting.asked = {mix: finished(self._prompts.now(mix)) for mix in mixes}  # more than the cache may keep
        else:
            waiting.ask(self._prompts, mixes)
        with self._lock:
            self._count = waiting.number = self._count + 1
            self._waiting.append(waiting)
            if at_once:
                self._waited += time.perf_counter() - began
            return waiting.number

    def _ahead(self) -> Script:
        """What the events before a new one lead to: a guess, which the edge sets right."""
        with self._lock:
            last = self._waiting[-1] if self._waiting else None
        return self._script if last is None else last.script(self._script, self.next)

    def edge(self) -> None:
        """Put into effect what is ready, before chunk `next`.

        Raises, once, what made an event impossible; that event is dropped, and the next call goes on with those after.
        """
        with self._lock:
            ready = max((i + 1 for i, waiting in enumerate(self._waiting) if waiting.at_once), default=0)
            count = len(self._waiting)
        for place in range(count):
            head = self._waiting[0]
            script = head.script(self._script, self.next)
            mixes = script.mixes(self.next)
            if place >= ready and not head.ask(self._prompts, mixes):
                head.ask(self._prompts, head.script(self._script, self.next + 1).mixes(self.next + 1))
                return
            try:
                keys = head.made(self._prompts, mixes)
            except Exception as error:
                self._waiting.popleft()
                raise _dropped(head, error) from error
            self._waiting.popleft()
            self._apply(head, script, keys)

    def _apply(self, waiting: Waiting, script: Script, keys: dict[Mix, Keys]) -> None:
        self._script, self._keys = script, keys
        self._flush |= script.event.switch == "flush"
        self._recache |= script.event.switch == "recache"
        self.last_event_id, self.applied_at_chunk = waiting.number, self.next
        self._applied.append((waiting.number, waiting.pushed, time.monotonic()))

    @property
    def keys(self) -> Keys:
        """What the next chunk reads."""
        return self._keys[self._script.at(self.next).mix]

    def take(self) -> tuple[Keys, bool, bool, bool]:
        """(keys and values, flush, recache, cut) of chunk `next`; the one after it is then next."""
        cue, keys = self._script.at(self.next), self.keys
        flush, recache = cue.opens or self._flush, self._recache
        self._flush = self._recache = False
        self.next += 1
        self._keys = {mix: self._keys[mix] for mix in self._script.mixes(self.next)}
        return keys, flush, recache, cue.cut

    def waited(self) -> float:
        """Seconds that callers waited for text since this was last asked."""
        with self._lock:
            seconds, self._waited = self._waited, 0.0
        return seconds

    def receipts(self) -> tuple[Receipt, ...]:
        """Of the events that the chunk just made is the first to show."""
        shown, applied = time.monotonic(), self._applied
        self._applied = []
        return tuple(Receipt(*each, shown) for each in applied)

    def about(self) -> dict[str, Any]:
        """All that a session needs to go on from here, as values of JSON."""
        with self._lock:
            waiting = [[each.number, dataclasses.asdict(each.event), each.at_once] for each in self._waiting]
            count = self._count
        return {
            "next": self.next,
            "events": count,
            "last_event_id": self.last_event_id,
            "applied_at_chunk": self.applied_at_chunk,
            "script": [dataclasses.asdict(self._script.event), self._script.since, self._script.origin],
            "flush": self._flush,
            "recache": self._recache,
            "applied": [number for number, *_ in self._applied],
            "waiting": waiting,
        }

    def restore(self, about: dict[str, Any]) -> None:
        """Go on from what `about` said; prompts are encoded here, and the clocks of events that wait begin anew.

        Numbers of events are not given twice.  Raises what the encoder raises, and SnapshotError where `about` makes no
        sense, with nothing changed.
        """
        now = time.monotonic()
        with _making_sense():
            event, since, origin = about["script"]
            event = Prompt(**event)
            mix = tuple((_is(str, text), float(weight)) for text, weight in origin)
            if not all(0 <= weight <= 1 for _, weight in mix):
                raise ValueError(f"weights of {mix}")
            script = Script(event, timeline(event.text, self._config), _is(int, since), trimmed(mix))
            waiting: deque[Waiting] = deque()
            for number, fields, at_once in about["waiting"]:
                event = Prompt(**fields)
                scenes = timeline(event.text, self._config)
                waiting.append(Waiting(_is(int, number), event, scenes, now, _is(bool, at_once)))
            upcoming, count, last = (_is(int, about[name]) for name in ("next", "events", "last_event_id"))
            since, flush, recache = about["applied_at_chunk"], _is(bool, about["flush"]), _is(bool, about["recache"])
            since = since if since is None else _is(int, since)
            applied = [(_is(int, number), now, now) for number in about["applied"]]
        keys = {mix: self._prompts.now(mix) for mix in script.mixes(upcoming)}
        self._script, self._keys, self.next = script, keys, upcoming
        self.last_event_id, self.applied_at_chunk = last, since
        self._flush, self._recache, self._applied = flush, recache, applied
        with self._lock:
            self._waiting, self._count = waiting, max(self._count, count)


def first_text(about: dict[str, Any]) -> str:
    """The prompt of what `Director.about` says.  Raises SnapshotError where it makes no sense."""
    with _making_sense():
        return _is(str, about["script"][0]["text"])


@contextmanager
def _making_sense() -> Iterator[None]:
    """SnapshotError for what is wrong with values that a file may hold."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SnapshotError(
            f"the snapshot says of its prompts and events what makes no sense ({error!r}); take it again"
        ) from error


def _is(kind: type, value: Any) -> Any:
    """A value of that very type."""
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _dropped(waiting: Waiting, error: Exception) -> CFEngineError:
    """What an event that cannot be is reported as."""
    kind = type(error) if isinstance(error, CFEngineError) else CFEngineError
    return kind(f"event {waiting.number} ({waiting.event.text!r}) is dropped, the stream goes on: {error}")
