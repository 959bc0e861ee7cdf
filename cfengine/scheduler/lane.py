"""A lane carries the chunks of one session, or of several in lock-step, from noise to pixels."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cfengine.codec import StreamDecoder
from cfengine.config import EngineConfig
from cfengine.errors import ConfigError
from cfengine.memory.memory import Memory
from cfengine.model.dit import CrossCache
from cfengine.ranges import span
from cfengine.scheduler.batch import joined
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import chunk_noise
from cfengine.types import LayerEvents


class Step(NamedTuple):
    """What a session asks of its lane."""

    start: int  # first latent frame of the chunk
    seed: int
    cross: list[CrossCache]  # of its prompt, per layer
    opens: bool = False  # a scene begins
    cut: bool = False  # with a jump of temporal positions


class Chunk(NamedTuple):
    """What a session gets: pixels (frames, H, W, 3) uint8, latents as `Session.latents`, seconds of `ChunkTimings`."""

    pixels: np.ndarray
    latents: Tensor
    denoise: float
    decode: float
    clean: float
    events: LayerEvents


class Lane(Protocol):
    """Interface of every lane; memories and steps have one entry a session."""

    memories: list[Memory]  # none once it is closed

    def run(self, steps: list[Step]) -> list[Chunk]:
        """Generate the next chunk of every session."""
        ...

    def prime(self, step: Step, latents: Tensor) -> int:
        """Take the latents of a chunk as given; returns how many video frames they stand for."""
        ...

    def close(self) -> None:
        """Let go of pages and decoders."""
        ...


def check_steps(steps: list[Step], sessions: int) -> None:
    """Raise ConfigError unless every session of a lane takes part."""
    if len(steps) != sessions:
        raise ConfigError(
            f"{len(steps)} session asks for a chunk, but it is one of a batch of {sessions} that move in lock-step; "
            "ask Batch.next_chunk"
        )


class HostLane:
    """Pass by pass, as the host asks for it: on a CPU nothing overlaps, so the clean pass waits until it is needed."""

    def __init__(
        self, scheduler: ChunkScheduler, config: EngineConfig, memories: list[Memory], decoders: list[StreamDecoder]
    ) -> None:
        self.memories = memories
        self._scheduler, self._decoders = scheduler, decoders
        self._frames = config.memory.chunk_frames
        self._shape = config.model.in_channels, config.video.latent_height, config.video.latent_width
        self._owed: tuple[list[Step], Tensor] | None = None  # chunk whose clean pass is due
        self._shown = [memory.show() for memory in memories]

    def run(self, steps: list[Step]) -> list[Chunk]:
        """See `Lane.run`."""
        check_steps(steps, len(self.memories))
        with span("clean"):
            clean = self._pay()
        for memory, step in zip(self.memories, steps, strict=True):
            if step.opens:
                memory.flush()
        began = time.perf_counter()
        memory, start, cut, cross = self._joined(steps)
        with span("denoise"):
            x0 = self._scheduler.denoise(memory, cross, start, lambda i: self._noise(steps, i), cut=cut)
        denoised = time.perf_counter()
        parts = x0.chunk(len(steps))
        with span("decode"):
            pixels = [decoder.decode(part) for decoder, part in zip(self._decoders, parts, strict=True)]
        decoded = time.perf_counter()
        self._owed = steps, x0
        seconds = denoised - began, decoded - denoised, clean
        events = self._events()
        return [Chunk(*shown, *seconds, event) for *shown, event in zip(pixels, parts, events, strict=True)]

    def prime(self, step: Step, latents: Tensor) -> int:
        """See `Lane.prime`."""
        check_steps([step], len(self.memories))
        self._pay()
        self._scheduler.clean_pass(self.memories[0], step.cross, step.start, latents)
        self._events()
        return len(self._decoders[0].decode(latents))

    def _joined(self, steps: list[Step]):
        return joined(self.memories, [s.start for s in steps], [s.cut for s in steps], [s.cross for s in steps])

    def _noise(self, steps: list[Step], i: int) -> Tensor:
        return torch.cat([chunk_noise(step.seed, step.start, self._frames, i, self._shape) for step in steps])

    def _events(self) -> list[LayerEvents]:
        """What each memory did since this was last asked."""
        before, self._shown = self._shown, [memory.show() for memory in self.memories]
        return [old.events_until(new) for old, new in zip(before, self._shown, strict=True)]

    def _pay(self) -> float:
        """Run the clean pass that the last chunk still owes; returns the seconds that it took."""
        if self._owed is None:
            return 0.0
        began = time.perf_counter()
        steps, x0 = self._owed
        memory, start, cut, cross = self._joined(steps)
        self._scheduler.clean_pass(memory, cross, start, x0, cut=cut)
        self._owed = None
        return time.perf_counter() - began

    def close(self) -> None:
        """See `Lane.close`."""
        self.memories, self._decoders, self._owed = [], [], None
