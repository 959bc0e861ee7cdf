"""What chunks show from an event on, and the events that no chunk shows yet."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from cfengine.events import Event, Prompt
from cfengine.scheduler.prompts import Keys, Mix, PromptCache, mixed, pure, trimmed
from cfengine.scheduler.scenes import Timeline


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

    def anew(self, chunk: int) -> Script:
        """The same from its first scene on, with nothing that leads to it."""
        return Script(Prompt(self.event.text), self.timeline, chunk)


class Orders(NamedTuple):
    """What the lane is to do at a chunk, see `Step`; seed: of its noise from there on, None as before."""

    keys: Keys
    flush: bool
    recache: bool
    cut: bool
    reset: bool
    seed: int | None


@dataclass
class Waiting:
    """An event that no chunk has shown yet."""

    number: int
    event: Event
    timeline: Timeline | None  # of a prompt
    pushed: float
    at_once: bool  # the next edge takes it, ready or not
    asked: dict[Mix, Future] = field(default_factory=dict)

    def script(self, before: Script, chunk: int) -> Script:
        """What it asks for, were it to count from `chunk` on."""
        if self.timeline is None:
            return before.anew(chunk)
        return Script(self.event, self.timeline, chunk, trimmed(before.at(chunk).mix))

    def ask(self, prompts: PromptCache, mixes: list[Mix]) -> bool:
        """Have mixes made beside the chunks, and let go of others; returns whether all are there, or failed."""
        self.asked = {mix: self.asked[mix] if mix in self.asked else prompts.ask(mix) for mix in mixes}
        return all(self.asked[mix].done() for mix in mixes)

    def made(self, prompts: PromptCache, mixes: list[Mix]) -> dict[Mix, Keys]:
        """Mixes and their keys and values, waiting for what is not there yet."""
        return {mix: self.asked[mix].result() if mix in self.asked else prompts.now(mix) for mix in mixes}
