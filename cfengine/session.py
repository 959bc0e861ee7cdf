"""One live video: prompt, seed, memory, decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.device import device_errors
from cfengine.errors import CFEngineError, ConfigError
from cfengine.memory.memory import Memory
from cfengine.model.dit import CrossCache
from cfengine.scheduler.lane import Chunk, Lane, Step
from cfengine.scheduler.scenes import timeline
from cfengine.types import ChunkTimings, Frame


class Session:
    """A live video that goes on for as long as frames are asked for; made by `Engine.session`.

    A chunk's frames leave before its clean pass is through. On a CPU that pass runs when the next chunk is asked for,
    so a stream that ends does not pay for it. Nothing grows with time. Not thread-safe: one consumer at a time.
    """

    def __init__(
        self,
        config: EngineConfig,
        lane: Lane,
        encode: Callable[[str], list[CrossCache]],
        prompt: str,
        seed: int,
        on_close: Callable[[Session], None] = lambda session: None,
        *,
        place: int = 0,
    ) -> None:
        """on_close: told once; whoever opened the lane has it back then      place: among the sessions of the lane."""
        self.config, self.seed = config, seed
        self.latents: Tensor | None = None  # of the newest chunk: (chunk_frames, channels, height, width) float32
        self._lane: Lane | None = lane
        self._place, self._encode, self._on_close = place, encode, on_close
        self._start = 0  # first latent frame of the next chunk
        self._index = 0  # next video frame
        self._chunks = 0  # chunks generated
        self._text_seconds = 0.0
        self.set_prompt(prompt)

    @property
    def memory(self) -> Memory:
        """Pages and tables, to look at; on a GPU the clean pass may still be changing them, so synchronise first."""
        self._check_open()
        return self._lane.memories[self._place]

    @property
    def prompt(self) -> str:
        """What the newest chunk shows, or the first will."""
        return self._timeline.scenes[self._timeline.at(max(0, self._chunks - 1 - self._prompt_since))[0]].prompt

    def set_prompt(self, prompt: str) -> None:
        """Change the prompt from the next chunk on: cross-attention only, the memory keeps what it has.

        Every scene is encoded here, so that no later chunk waits or fails.  Raises PromptError, with nothing changed.
        """
        self._check_open()
        began = time.perf_counter()
        scenes = timeline(prompt, self.config)
        caches = [self._encode(scene.prompt) for scene in scenes.scenes]
        self._timeline, self._caches, self._prompt_since = scenes, caches, self._chunks
        self._text_seconds += time.perf_counter() - began

    def prime(self, latents: Tensor) -> None:
        """Take given latents as the past: clean passes over them, chunk by chunk, and through the decoder.

        latents: (frames, channels, height, width), whole chunks.  Frame indices go on after them.
        Raises ConfigError for another shape.  The session closes if anything fails once the work has begun.
        """
        self._check_open()
        frames, shape = self.config.memory.chunk_frames, self._latent_shape
        if latents.ndim != 4 or latents.shape[0] == 0 or latents.shape[0] % frames or tuple(latents.shape[1:]) != shape:
            raise ConfigError(
                f"latents to prime from are {tuple(latents.shape)}; give a multiple of {frames} frames of {shape}"
            )
        scene, _ = self._timeline.at(max(0, self._chunks - self._prompt_since))
        with self._closing_on_error():
            for chunk in latents.to(self.memory.device, torch.float32).split(frames):
                step = Step(self._start, self.seed, self._caches[scene])
                self._index += self._lane.prime(step, chunk)
                self._start += frames

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        video = self.config.video
        return self.config.model.in_channels, video.latent_height, video.latent_width

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """Close the session when work on a chunk is cut short: its pages and decoder would be half a chunk ahead."""
        with closing_on_error([self]):
            yield

    def next_chunk(self) -> list[Frame]:
        """Generate one chunk and return its frames (9 first, then 12, for a chunk of 3 latent frames).

        Raises CFEngineError on a closed session.  Any failure or interruption inside closes the session: there is no
        going on from half a chunk.
        """
        self._check_open()
        with self._closing_on_error():
            return self._generate()

    def _generate(self) -> list[Frame]:
        return self._accept(*self._lane.run([self._step()]))

    def _step(self) -> Step:
        """What the lane shall make next."""
        scene, opens = self._timeline.at(self._chunks - self._prompt_since)
        cut = opens and self._timeline.scenes[scene].cut
        return Step(self._start, self.seed, self._caches[scene], opens, cut)

    def _accept(self, chunk: Chunk) -> list[Frame]:
        """Count a chunk that the lane has made."""
        timings = ChunkTimings(
            chunk=self._chunks,
            denoise=chunk.denoise,
            decode=chunk.decode,
            clean=chunk.clean,
            text=self._text_seconds,
            memory=chunk.events,
        )
        self._text_seconds = 0.0
        self.latents = chunk.latents
        self._start += self.config.memory.chunk_frames
        self._chunks += 1
        return self._wrap(chunk.pixels, timings)

    def _wrap(self, pixels: np.ndarray, timings: ChunkTimings) -> list[Frame]:
        first, fps = self._index, self.config.video.fps
        self._index += len(pixels)
        return [Frame(image, first + i, (first + i) / fps, timings) for i, image in enumerate(pixels)]

    def frames(self, num_frames: int | None = None) -> Iterator[Frame]:
        """Yield frames as chunks are decoded; None goes on for ever, any other number cuts the last chunk.

        Raises ConfigError for a bad number at the call, and what `next_chunk` raises.
        """
        check_num_frames(num_frames)
        return self._frames(num_frames)

    def _frames(self, num_frames: int | None) -> Iterator[Frame]:
        left = num_frames
        while left is None or left > 0:
            chunk = self.next_chunk()
            yield from chunk if left is None else chunk[:left]
            left = None if left is None else left - len(chunk)

    @property
    def closed(self) -> bool:
        return self._lane is None

    def _check_open(self) -> None:
        if self.closed:
            raise CFEngineError("this session is closed; open a new one with Engine.session(...)")

    def close(self) -> None:
        """Give the memory back; the session cannot be used afterwards. Closing twice is harmless."""
        if not self.closed:
            self._lane, self._encode, self._caches = None, None, []
            self._on_close(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Batch:
    """Sessions that move in lock-step: products and norms run once over the tokens of all; made by `Engine.batch`.

    Prompts change through the sessions, chunks come from here. Each session sees what it would see alone, but for the
    rounding of larger products.
    """

    def __init__(self, sessions: list[Session], lane: Lane) -> None:
        self.sessions, self._lane = sessions, lane

    def next_chunk(self) -> list[list[Frame]]:
        """Generate one chunk of every session; one list of frames a session, as `Session.next_chunk`.

        Any failure closes all of them.
        """
        for session in self.sessions:
            session._check_open()
        with closing_on_error(self.sessions):
            chunks = self._lane.run([session._step() for session in self.sessions])
            return [session._accept(chunk) for session, chunk in zip(self.sessions, chunks, strict=True)]

    def close(self) -> None:
        """Close every session; harmless twice."""
        for session in self.sessions:
            session.close()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def closing_on_error(sessions: list[Session]) -> Iterator[None]:
    """Close sessions, and for good their lane, when work on a chunk is cut short; one sentence for what a GPU reports.

    sessions: of one lane, open
    """
    lane, config, keys = sessions[0]._lane, sessions[0].config, sessions[0].memory.pool.k
    try:
        with device_errors(config, keys.device, keys.element_size()):
            yield
    except BaseException:
        lane.close()  # it is half a chunk ahead, or its GPU is lost: nobody may have it again
        for session in sessions:
            session.close()
        raise


def check_num_frames(num_frames: int | None) -> None:
    """Raise ConfigError unless `num_frames` is None or a positive whole number."""
    if num_frames is not None and (not isinstance(num_frames, (int, np.integer)) or num_frames < 1):
        raise ConfigError(
            f"num_frames is {num_frames!r}; it must be a positive whole number, or None for an endless stream"
        )


def check_seed(seed: int) -> None:
    """Raise ConfigError unless `seed` fits the noise generator's 64-bit key."""
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}; it must be a whole number from 0 to 2**64 - 1")
