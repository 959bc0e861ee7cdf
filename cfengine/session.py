"""One live video: prompt, seed, memory, decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.errors import CFEngineError, ConfigError
from cfengine.memory.memory import Memory
from cfengine.memory.policies import Window
from cfengine.model.dit import CrossCache
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import chunk_noise
from cfengine.scheduler.scenes import Scene, parse_scenes
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
        decoder,
        encode: Callable[[str], list[CrossCache]],
        prompt: str,
        seed: int,
        on_close: Callable[[Session], None] = lambda session: None,
    ) -> None:
        self.config, self.seed = config, seed
        self._scheduler, self._memory, self._decoder, self._encode = scheduler, memory, decoder, encode
        self._on_close = on_close
        self._pending: tuple[int, Tensor, list[CrossCache], bool] | None = None  # chunk whose clean pass is due
        self._start = 0  # first latent frame of the next chunk
        self._index = 0  # next video frame
        self._chunks = 0  # chunks generated
        self._text_seconds = self._clean_seconds = 0.0
        self._scenes = self._plan(prompt)
        self._use(self._scenes[0])

    def _plan(self, prompt: str) -> list[Scene]:
        """Scenes of the prompt: Infinity-RoPE's window reads `a[3s] | b`, other policies take the text as it is."""
        memory = self.config.memory
        if memory.policy == "relative_window" and memory.sink == 1:
            frames = memory.chunk_frames * self.config.video.temporal_stride
            return parse_scenes(prompt, fps=self.config.video.fps, frames_per_chunk=frames)
        return [Scene(prompt, 0, False)]

    def _use(self, scene: Scene) -> None:
        started = time.perf_counter()
        self._cross = self._encode(scene.prompt)
        self._text_seconds += time.perf_counter() - started
        self.prompt = scene.prompt
        self._chunks_left = scene.chunks

    @property
    def memory(self) -> Memory:
        """Pages and tables, to look at."""
        return self._memory

    def set_prompt(self, prompt: str) -> None:
        """Change the prompt from the next chunk on: cross-attention only, the memory keeps what it has."""
        self._check_open()
        scenes = self._plan(prompt)
        self._use(scenes[0])
        self._scenes = scenes

    def prime(self, latents: Tensor) -> None:
        """Take given latents as the past: clean passes over them, chunk by chunk, and through the decoder.

        latents: (frames, channels, height, width), whole chunks.  Frame indices go on after them.
        """
        self._check_open()
        frames, shape = self.config.memory.chunk_frames, self._latent_shape
        if latents.ndim != 4 or latents.shape[0] == 0 or latents.shape[0] % frames or tuple(latents.shape[1:]) != shape:
            raise ConfigError(
                f"latents to prime from are {tuple(latents.shape)}; give a multiple of {frames} frames of {shape}"
            )
        self._finish_chunk()
        for chunk in latents.float().split(frames):
            self._scheduler.clean_pass(self._memory, self._cross, self._start, chunk)
            self._index += len(self._decoder.decode(chunk))
            self._start += frames

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        video = self.config.video
        return self.config.model.in_channels, video.latent_height, video.latent_width

    def _finish_chunk(self) -> None:
        """Run the clean pass that the last chunk still owes."""
        if self._pending is None:
            return
        start, x0, cross, cut = self._pending
        self._pending = None
        began = time.perf_counter()
        self._scheduler.clean_pass(self._memory, cross, start, x0, cut=cut)
        self._clean_seconds = time.perf_counter() - began

    def _next_scene(self) -> bool:
        """Move to the next scene when the current one is over; True when the new one begins with a cut."""
        if len(self._scenes) < 2 or self._chunks_left > 0:
            return False
        self._scenes.pop(0)
        self._use(self._scenes[0])
        if isinstance(self._memory.policy, Window):
            self._memory.policy.flush(self._memory.tables)
        return self._scenes[0].cut

    def next_chunk(self) -> list[Frame]:
        """Generate one chunk and return its frames (9 first, then 12, for a chunk of 3 latent frames)."""
        self._check_open()
        before = self._memory.snapshot_events()
        self._finish_chunk()
        cut = self._next_scene()
        frames = self.config.memory.chunk_frames
        began = time.perf_counter()
        x0 = self._scheduler.denoise(
            self._memory,
            self._cross,
            self._start,
            lambda i: chunk_noise(self.seed, self._start, frames, i, self._latent_shape),
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
        self.latents = x0
        self._pending = (self._start, x0, self._cross, cut)
        self._start += frames
        self._chunks += 1
        self._chunks_left -= 1
        return self._wrap(pixels, timings)

    def _wrap(self, pixels: np.ndarray, timings: ChunkTimings) -> list[Frame]:
        first, fps = self._index, self.config.video.fps
        self._index += len(pixels)
        return [Frame(image, first + i, (first + i) / fps, timings) for i, image in enumerate(pixels)]

    def frames(self, num_frames: int | None = None) -> Iterator[Frame]:
        """Yield frames as chunks are decoded; None goes on for ever, any other number cuts the last chunk."""
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
            self._memory = self._decoder = self._pending = None
            self._cross = []
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
