"""What a live session is told while it runs; an event counts from the first chunk that begins after it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfengine.errors import ConfigError, PromptError

SWITCHES = ("cross", "flush", "recache", "blend(n)")
BLEND_LIMIT = 16  # chunks; the keys and values of every step are made before the first
_BLEND = re.compile(r"blend\(([0-9]{1,4})\)")


@dataclass(frozen=True)
class Prompt:
    """Show something else from the next chunk on.

    text: as for `Engine.session`, scenes included      switch: what becomes of what the memory holds:
    "cross"     it stays: the new text is read by cross-attention alone
    "flush"     it is let go but for the first frame and the last two, as between scenes; policies with a window only
    "recache"   its keys and values are computed again under the new text, from the latents that made them
    "blend(n)"  it stays, and the rows of the text encoder go from the old text to the new in n equal steps, one a
                chunk: chunk i of n reads (1 - i / n) old + i / n new, so that "blend(1)" is "cross"
    Raises PromptError for an empty text, ConfigError for another switch or n outside 1..16.
    """

    text: str
    switch: str = "cross"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise PromptError("the prompt is empty; say what the video shows")
        found = _BLEND.fullmatch(str(self.switch))
        if not found and self.switch not in SWITCHES[:-1]:
            raise ConfigError(f"unknown switch {self.switch!r}; choose one of {', '.join(SWITCHES)}")
        if found and not 1 <= int(found[1]) <= BLEND_LIMIT:
            raise ConfigError(f"switch {self.switch!r} lasts {found[1]} chunks; choose 1 to {BLEND_LIMIT}")

    @property
    def chunks(self) -> int:
        """Over how many chunks the new text comes in."""
        found = _BLEND.fullmatch(self.switch)
        return int(found[1]) if found else 1


@dataclass(frozen=True)
class Reset:
    """Begin anew with the next chunk, under the prompt of now: memory, decoder and clock of scenes forget everything.

    seed: of the noise from there on; None keeps the session's
    What is shown is, bit for bit, what a new session of that prompt and seed shows; indices and times of frames,
    numbers of chunks and of events go on, and the first frame says that it follows nothing (`Frame.cut`). A blend under
    way is over. A past that the session was opened with is gone too: `Session.rewind` goes back to a moment.
    Raises ConfigError for a bad seed.
    """

    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_seed(self.seed)
            object.__setattr__(self, "seed", int(self.seed))  # one of numpy is no number of JSON


Event = Prompt | Reset  # every kind that there is


def event_of(fields: dict[str, Any]) -> Event:
    """An event from what `dataclasses.asdict` made of it.  Raises TypeError where that is none."""
    return Prompt(**fields) if "text" in fields else Reset(**fields)


def check_seed(seed: int) -> None:
    """Raise ConfigError unless `seed` fits the noise generator's 64-bit key."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}; it must be a whole number from 0 to 2**64 - 1")
