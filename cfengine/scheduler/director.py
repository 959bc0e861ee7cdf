"""What the chunks of a session show: its script, and the events that change it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from cfengine.config import EngineConfig
from cfengine.errors import CFEngineError, ConfigError, DeviceError, PromptError, SnapshotError
from cfengine.events import Event, Prompt, Reset, event_of
from cfengine.memory.policies import flushes
from cfengine.scheduler.prompts import Keys, Mix, PromptCache, bytes_of, finished, trimmed
from cfengine.scheduler.scenes import Timeline, timeline
from cfengine.scheduler.script import Orders, Script, Waiting
from cfengine.types import Receipt

LIMIT = 256  # events that wait: more come from a program that pushes and takes no frames
WAITING_BYTES = 2**30  # keys and values that they may hold: 55 prompts of 100 tokens at 1.3 billion parameters


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
        self._flush = self._recache = self._reset = False
        self._seed: int | None = None
        self._applied: list[tuple[int, float, float]] = []  # of the chunk to come: event, pushed, applied
        began = time.perf_counter()
        self._script = Script(Prompt(prompt), timeline(prompt, config))
        self._keys = {mix: prompts.now(mix) for mix in self._script.mixes(0)}
        self._itemsize = self.keys[0].k.element_size()
        self._waited = time.perf_counter() - began  # seconds that callers waited for text since the last chunk

    @property
    def prompt(self) -> str:
        """What the newest chunk shows, or the first will."""
        return self._script.at(self.next - 1).prompt

    def push(self, event: Event, *, at_once: bool) -> int:
        """Take an event; returns its number, 1, 2, ... See `Session.push`."""
        pushed, began = time.monotonic(), time.perf_counter()
        if not isinstance(event, Event):
            raise ConfigError(f"{event!r} is no event; push a Prompt(text, switch) or a Reset(seed)")
        scenes = self._checked(event) if isinstance(event, Prompt) else None
        if len(self._waiting) >= LIMIT:
            raise CFEngineError(f"{LIMIT} events wait, and a session takes no more; ask it for chunks between events")
        waiting = Waiting(0, event, scenes, pushed, at_once)
        mixes = waiting.script(self._ahead(), self.next).mixes(self.next)
        self._check_room(mixes)
        if scenes is None:
            pass  # all that it needs belongs to what was before
        elif at_once:
            waiting.asked = {mix: finished(self._prompts.now(mix)) for mix in mixes}  # more than the cache may keep
        else:
            waiting.ask(self._prompts, mixes)
        with self._lock:
            self._count = waiting.number = self._count + 1
            self._waiting.append(waiting)
            if at_once:
                self._waited += time.perf_counter() - began
            return waiting.number

    def _checked(self, event: Prompt) -> Timeline:
        """Its scenes.  Raises what is known to be wrong with it."""
        if event.switch == "flush" and not flushes(self._config.memory):
            raise ConfigError(
                f"policy {self._config.memory.policy!r} has no scenes to flush; choose another switch, or a policy "
                "with a window: fifo, sink_window, relative_window"
            )
        scenes = timeline(event.text, self._config)
        for scene in scenes.scenes:
            self._prompts.check(scene.prompt)
        return scenes

    def _check_room(self, mixes: list[Mix]) -> None:
        """Raise CFEngineError where waiting events would hold too much with these; the first is always taken."""
        with self._lock:
            asked = {mix: future for waiting in self._waiting for mix, future in waiting.asked.items()}
        held = sum(self._bytes(mix, future) for mix, future in asked.items())
        more = sum(self._bytes(mix) for mix in mixes if mix not in asked)
        if asked and more and held + more > WAITING_BYTES:
            raise CFEngineError(
                f"events that wait hold up to {held:,} bytes of keys and values and this one up to {more:,} more, "
                f"but a session sets {WAITING_BYTES:,} aside; ask it for chunks between events, or blend over fewer"
            )

    def _bytes(self, mix: Mix, future: Future | None = None) -> int:
        """Size of the keys and values of a mix, or the most that they can have while they are not made.

        No encoder makes more tokens of a text than it has bytes; two more begin and end it, and one stands for padding.
        """
        if future is not None and future.done():
            return 0 if future.exception() else bytes_of(future.result())
        model, longest = self._config.model, max(len(text.encode()) for text, _ in mix)
        return 2 * self._itemsize * model.layers * model.dim * (min(model.text_len, longest + 2) + 1)

    def _ahead(self) -> Script:
        """What the events before a new one lead to: a guess, which the edge sets right."""
        with self._lock:
            last = next((waiting for waiting in reversed(self._waiting) if waiting.timeline), None)
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
            if head.timeline is None:
                self._shift()
                self._apply(head, script, {mix: self._keys[mix] for mix in mixes})
                continue
            if place >= ready and not head.ask(self._prompts, mixes):
                head.ask(self._prompts, head.script(self._script, self.next + 1).mixes(self.next + 1))
                return
            try:
                keys = head.made(self._prompts, mixes)
            except Exception as error:
                self._shift()
                raise _dropped(head, error) from error
            self._shift()
            self._apply(head, script, keys)

    def _shift(self) -> None:
        """Let the oldest event go; a `push` in another thread may be looking through those that wait."""
        with self._lock:
            self._waiting.popleft()

    def _apply(self, waiting: Waiting, script: Script, keys: dict[Mix, Keys]) -> None:
        self._script, self._keys = script, keys
        if isinstance(waiting.event, Reset):
            self._reset, self._flush, self._recache = True, False, False
            self._seed = self._seed if waiting.event.seed is None else waiting.event.seed
        self._flush |= script.event.switch == "flush"
        self._recache |= script.event.switch == "recache"
        self.last_event_id, self.applied_at_chunk = waiting.number, self.next
        self._applied.append((waiting.number, waiting.pushed, time.monotonic()))

    @property
    def keys(self) -> Keys:
        """What the next chunk reads."""
        return self._keys[self._script.at(self.next).mix]

    def take(self) -> Orders:
        """Orders for chunk `next`; the one after it is then next."""
        cue = self._script.at(self.next)
        orders = Orders(self.keys, cue.opens or self._flush, self._recache, cue.cut, self._reset, self._seed)
        self._flush = self._recache = self._reset = False
        self._seed = None
        self.next += 1
        self._keys = {mix: self._keys[mix] for mix in self._script.mixes(self.next)}
        return orders

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
            "reset": [self._reset, self._seed],
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
                event = event_of(fields)
                scenes = timeline(event.text, self._config) if isinstance(event, Prompt) else None
                waiting.append(Waiting(_is(int, number), event, scenes, now, _is(bool, at_once)))
            upcoming, count, last = (_is(int, about[name]) for name in ("next", "events", "last_event_id"))
            since, flush, recache = about["applied_at_chunk"], _is(bool, about["flush"]), _is(bool, about["recache"])
            since = since if since is None else _is(int, since)
            reset, seed = _is(bool, about["reset"][0]), Reset(about["reset"][1]).seed
            applied = [(_is(int, number), now, now) for number in about["applied"]]
        keys = {mix: self._prompts.now(mix) for mix in script.mixes(upcoming)}
        self._script, self._keys, self.next = script, keys, upcoming
        self.last_event_id, self.applied_at_chunk = last, since
        self._flush, self._recache, self._reset, self._seed, self._applied = flush, recache, reset, seed, applied
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
    except (KeyError, IndexError, TypeError, ValueError, ConfigError, PromptError) as error:
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
    kind = type(error) if isinstance(error, PromptError | ConfigError | DeviceError) else CFEngineError
    made = kind(f"event {waiting.number} ({waiting.event.text!r}) is dropped, the stream goes on: {error}")
    made.event_id = waiting.number
    return made
