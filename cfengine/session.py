"""One live video: prompt, seed, memory, decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cfengine.codec import StreamDecoder
from cfengine.config import EngineConfig
from cfengine.errors import CFEngineError, ConfigError
from cfengine.memory.memory import Memory
from cfengine.model.dit import CrossCache
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import chunk_noise
from cfengine.scheduler.scenes import timeline
from cfengine.types import ChunkTimings, Frame, LayerEvents


class Session:
    """A live video that goes on for as long as frames are asked for; made by `Engine.session`.

    A chunk's frames leave before its clean pass; the clean pass runs when the next chunk is asked for, so a stream
    that ends does not pay for it. Nothing grows with time. Not thread-safe: one consumer at a time.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: ChunkScheduler,
        memory: Memory,
        decoder: StreamDecoder,
        encode: Callable[[str], list[CrossCache]],
        prompt: str,
        seed: int,
        on_close: Callable[[Session], None] = lambda session: None,
    ) -> None:
        self.config, self.seed = config, seed
        self.latents: Tensor | None = None  # of the newest chunk: (chunk_frames, channels, height, width) float32
        self._scheduler, self._memory, self._decoder, self._encode = scheduler, memory, decoder, encode
        self._on_close = on_close
        self._owed: tuple[int, Tensor, list[CrossCache], bool] | None = None  # chunk whose clean pass is due
        self._start = 0  # first latent frame of the next chunk
        self._index = 0  # next video frame
        self._chunks = 0  # chunks generated
        self._text_seconds = self._clean_seconds = 0.0
        self.set_prompt(prompt)

    @property
    def memory(self) -> Memory:
        """Pages and tables, to look at."""
        self._check_open()
        return self._memory

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
            self._pay()
            for chunk in latents.to(self._memory.device, torch.float32).split(frames):
                self._scheduler.clean_pass(self._memory, self._caches[scene], self._start, chunk)
                self._index += len(self._decoder.decode(chunk))
                self._start += frames

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        video = self.config.video
        return self.config.model.in_channels, video.latent_height, video.latent_width

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """Close the session when work on a chunk is cut short: its pages and decoder would be half a chunk ahead."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _pay(self) -> None:
        """Run the clean pass that the last chunk still owes."""
        if self._owed is None:
            return
        start, x0, cross, cut = self._owed
        began = time.perf_counter()
        self._scheduler.clean_pass(self._memory, cross, start, x0, cut=cut)
        self._clean_seconds, self._owed = time.perf_counter() - began, None

    def next_chunk(self) -> list[Frame]:
        """Generate one chunk and return its frames (9 first, then 12, for a chunk of 3 latent frames).

        Raises CFEngineError on a closed session.  Any failure or interruption inside closes the session: there is no
        going on from half a chunk.
        """
        self._check_open()
        with self._closing_on_error():
            return self._generate()

    def _generate(self) -> list[Frame]:
        frames, start = self.config.memory.chunk_frames, self._start
        before = self._memory.snapshot_events()
        self._pay()
        scene, opens = self._timeline.at(self._chunks - self._prompt_since)
        cut, cross = opens and self._timeline.scenes[scene].cut, self._caches[scene]
        if opens:
            self._memory.flush()
        began = time.perf_counter()
        x0 = self._scheduler.denoise(
            self._memory,
            cross,
            start,
            lambda i: chunk_noise(self.seed, start, frames, i, self._latent_shape),
            cut=cut,
        )
        denoised = time.perf_counter()
        pixels = self._decoder.decode(x0)
        decoded = time.perf_counter()
        promotions, evictions = self._memory.events_since(before)
        timings = ChunkTimings(
            chunk=self._chunks,
            denoise=denoised - began,
            decode=decoded - denoised,
            clean=self._clean_seconds,
            text=self._text_seconds,
            memory=LayerEvents(promotions, evictions),
        )
        self._clean_seconds = self._text_seconds = 0.0
        self.latents, self._owed = x0, (start, x0, cross, cut)
        self._start += frames
        self._chunks += 1
        return self._wrap(pixels, timings)

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
        return self._memory is None

    def _check_open(self) -> None:
        if self.closed:
            raise CFEngineError("this session is closed; open a new one with Engine.session(...)")

    def close(self) -> None:
        """Give the memory back; the session cannot be used afterwards. Closing twice is harmless."""
        if not self.closed:
            self._memory = self._decoder = self._owed = self._scheduler = self._encode = None
            self._caches = []
            self._on_close(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
