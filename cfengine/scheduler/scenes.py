"""Prompts with scenes: `a prompt[3s] | another[2.5s#] | a third` (Infinity-RoPE, `pipeline/causal_inference.py`)."""

from __future__ import annotations

import re
from typing import NamedTuple

from cfengine.errors import PromptError

DEFAULT_CHUNKS = 14
_DURATION = re.compile(r"\[(\d+\.?\d*)\s*s(#?)\]")


class Scene(NamedTuple):
    """A prompt, how many chunks it lasts, and whether it begins with a cut (a jump of temporal positions)."""

    prompt: str
    chunks: int
    cut: bool


def parse_scenes(prompt: str, *, fps: int = 16, frames_per_chunk: int = 12) -> list[Scene]:
    """Split a prompt at `|`; `[3s]` gives a duration, `#` makes the scene after it begin with a cut.

    A scene lasts int(seconds * fps / frames_per_chunk) chunks, at least one, 14 where no duration is given.
    """
    scenes: list[Scene] = []
    cut = False
    for part in prompt.split("|"):
        match = _DURATION.search(part)
        chunks = max(1, int(float(match.group(1)) * fps / frames_per_chunk)) if match else DEFAULT_CHUNKS
        text = _DURATION.sub("", part).strip()
        if not text:
            raise PromptError(
                f"scene {len(scenes) + 1} of {prompt!r} has no text; write what it shows before the duration"
            )
        scenes.append(Scene(text, chunks, cut))
        cut = "#" in part
    return scenes
