"""Prompts with scenes: `a prompt[3s] | another[2.5s#] | a third` (Infinity-RoPE, `pipeline/causal_inference.py`)."""

from __future__ import annotations

import re
from typing import NamedTuple

from cfengine.config import EngineConfig
from cfengine.errors import PromptError

DEFAULT_CHUNKS = 14
_DURATION = re.compile(r"\[(\d+\.?\d*)\s*s(#?)\]")


class Scene(NamedTuple):
    """A prompt, how many chunks it lasts, and whether it begins with a cut (a jump of temporal positions)."""

    prompt: str
    chunks: int
    cut: bool


class Timeline:
    """Which scene of a prompt a chunk belongs to. The last scene lasts for ever."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.scenes = scenes
        self.starts = [sum(scene.chunks for scene in scenes[:i]) for i in range(len(scenes))]

    def at(self, chunk: int) -> tuple[int, bool]:
        """(number of the scene, True when the chunk opens a scene after the first), chunks counted from 0."""
        number = max(i for i, start in enumerate(self.starts) if start <= chunk)
        return number, number > 0 and self.starts[number] == chunk


def timeline(prompt: str, config: EngineConfig) -> Timeline:
    """Scenes of a prompt where the memory knows scenes (`MemoryConfig.scenes`), else one scene: the text as it is."""
    if not config.memory.scenes:
        return Timeline([Scene(prompt, 0, False)])
    frames = config.memory.chunk_frames * config.video.temporal_stride
    return Timeline(parse_scenes(prompt, fps=config.video.fps, frames_per_chunk=frames))


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
