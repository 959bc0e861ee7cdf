"""One live video: prompt, seed, memory, decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.device import device_errors
from cfengine.errors import CFEngineError, ConfigError, FaultError, SnapshotError
from cfengine.events import Event, Prompt
from cfengine.memory.memory import Memory
from cfengine.scheduler.director import Director
from cfengine.scheduler.lane import Chunk, Lane, Step
from cfengine.scheduler.prompts import PromptCache
from cfengine.snapshot import COUNTERS, POOL, SharedPages, Snapshot
from cfengine.types import ChunkTimings, Frame


class Session:
    """A live video that goes on for as long as frames are asked for; made by `Engine.session`.

    A chunk's frames leave before its clean pass is through. On a CPU that pass runs when the next chunk is asked for,
    so a stream that ends does not pay for it. Nothing grows with time. One consumer at a time; `push` may be called
    from any thread beside it.
    """

    def __init__(
        self,
        config: EngineConfig,
        lane: Lane,
        prompts: PromptCache,
        prompt: str,
        seed: int,
        on_close: Callable[[Session], None] = lambda session: None,
        *,
        place: int | None = None,
        made_for: dict[str, Any] | None = None,
        resume: Callable[..., Session] | None = None,
        on_device: bool = False,
    ) -> None:
        """on_close: told once; whoever opened the lane has it back then      place: in the lane of a batch

        made_for: what a snapshot that fits says of itself      resume: opens a session at one
        on_device: frames stay on the GPU (`Engine.session`)
        """
        self.config, self.seed = config, seed
        self.latents: Tensor | None = None  # of the newest chunk: (chunk_frames, channels, height, width) float32
        self._lane: Lane | None = lane
        self._place, self._resume = place or 0, resume
        self._on_close: Callable[[Session], None] | None = on_close
        self._batched = place is not None
        self._effort = 0  # level of the next chunk
        self._on_device = on_device
        self._cut = False  # the next frame follows nothing
        self._start = 0  # first latent frame of the next chunk
        self._index = 0  # next video frame
        self._chunks = 0  # chunks generated
        self._director: Director | None = Director(config, prompts, prompt)
        self._made_for, self._shared = made_for or {}, SharedPages()

    @property
    def memory(self) -> Memory:
        """Pages and tables, to look at; on a GPU the clean pass may still be changing them, so synchronise first."""
        self._check_open()
        return self._lane.memories[self._place]

    @property
    def prompt(self) -> str:
        """What the newest chunk shows; before the first, what the session was opened with."""
        self._check_open()
        return self._director.prompt

    @property
    def efforts(self) -> tuple[float, ...]:
        """What a chunk costs at each level of effort, as a share of the first, which is full: (1.0, 0.8, 0.6, 0.48).

        A level leaves out one more denoise pass than the one before, and in the last the two that are left attend to
        the sink and the nearest slots alone, where the engine's memory has more (`Schedule.efforts`). On a GPU there is
        one level, unless the engine was made with `efforts=True`. Decoding costs the same at all levels and is not
        counted.
        """
        lane = self._lane  # which a consumer may close meanwhile
        self._check_open()
        return lane.costs

    @property
    def effort(self) -> int:
        """Level of effort of the chunks that begin from now on, 0 for full; to be set from any thread.

        In a batch, which shares its passes, a chunk has the level of the session that asks for the most; what a chunk
        was made with is `ChunkTimings.effort`. Raises ConfigError for a level that there is not.
        """
        return self._effort

    @effort.setter
    def effort(self, level: int) -> None:
        levels = len(self.efforts)
        if type(level) is not int or not 0 <= level < levels:
            raise ConfigError(
                f"effort is {level!r}, and this session has {levels} level(s), 0 for full; on a GPU, load the engine "
                "with efforts=True for more than one"
            )
        self._effort = level

    def push(self, event: Event, *, wait: bool = False) -> int:
        """Tell the session something, from any thread; returns the event's number, 1, 2, ...

        It counts from the next chunk on whose text is ready: text is encoded beside the chunks, none waits for it, and
        events keep their order. wait=True encodes here, so that the next chunk shows this event and all before it:
        what is shown then depends on the calls alone and not on the time that they take.
        Frames say what they show (`Frame.last_event_id`) and `ChunkTimings.events` when; events of one edge count
        together: the last prompt is shown, and the memory is flushed or computed again, once, where one of them asks.
        Raises PromptError and ConfigError for what is known to be wrong, and CFEngineError where 256 events, or more
        than 1 GiB of keys and values, wait for a consumer that asks for no chunk, with nothing changed. What turns out
        wrong later is raised once, by the next chunk, as an error with the number (`event_id`), which drops the event
        and leaves the session open.
        """
        director = self._director  # which a consumer may close meanwhile
        self._check_open()
        return director.push(event, at_once=wait)

    def set_prompt(self, prompt: str, switch: str = "cross") -> int:
        """Change the prompt from the next chunk on: `push(Prompt(prompt, switch), wait=True)`.

        Every scene is encoded here, so that no later chunk waits or fails.  Raises PromptError, with nothing changed.
        """
        return self.push(Prompt(prompt, switch), wait=True)

    def prime(self, latents: Tensor) -> None:
        """Take given latents as the past: clean passes over them, chunk by chunk, and through the decoder.

        latents: (frames, channels, height, width), whole chunks.  Frame indices go on after them.
        Raises ConfigError for another shape, and for numbers that are not finite.  The session closes if anything fails
        once the work has begun.
        """
        self._check_alone()
        frames, shape = self.config.memory.chunk_frames, self._latent_shape
        if latents.ndim != 4 or latents.shape[0] == 0 or latents.shape[0] % frames or tuple(latents.shape[1:]) != shape:
            raise ConfigError(
                f"latents to prime from are {tuple(latents.shape)}; give a multiple of {frames} frames of {shape}"
            )
        if not torch.isfinite(latents).all():
            raise ConfigError("latents to prime from hold numbers that are not finite; every page would have them")
        with self._closing_on_error():
            for chunk in latents.to(self.memory.device, torch.float32).split(frames):
                step = Step(self._start, self.seed, self._director.keys)
                self._index += self._lane.prime(step, chunk)
                self._start += frames

    def snapshot(self, *, device: torch.device | str | None = None) -> Snapshot:
        """All that the session is now, as a value that does not change; the session goes on as if nothing had been.

        device: where its tensors are kept (None: where the session's are). Pages that an earlier snapshot of this
        session has there are shared with it, so that another one a chunk later takes as much as the chunk's pages.
        A clean pass that is due runs first; the session closes if that fails. DeviceError where there is no room for
        the copy, and the session stays open.
        """
        here = self._here()
        pages = self.memory.pool.k
        with device_errors(self.config, pages.device, pages.element_size()):
            return dataclasses.replace(here, tensors=self._shared.taken(here.tensors, device))

    def branch(self) -> Session:
        """Another session that goes on from here with the same seed and the events that wait; a batch's is alone.

        Its frames are where this one's are.

        Given the same events both show the same, bit for bit. In an engine with `max_sessions` they share their pages,
        until one of the two writes them.  Raises as `Engine.session` does.
        """
        here = self._here()
        if self._resume is None:
            raise CFEngineError("this session was not opened by an engine; branch sessions of Engine.session(...)")
        return self._resume(here, frames="device" if self._on_device else "host")

    def rewind(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of this session, or of another that fits: frames, seed, prompts and events as then.

        Events that wait are dropped for those that waited then; numbers of events are not given twice.
        Raises SnapshotError for one that does not fit, and what encoding its prompts raises, with nothing changed. The
        session closes if anything fails later.
        """
        self._check_open()
        parts = self._lane.parts(self._place)
        snapshot.check(self._made_for, parts, (self.config.memory.chunk_frames, *self._latent_shape))
        about, latents = snapshot.about, snapshot.tensors.get("latents")
        snapshot.check_tables(self.memory)
        if about["effort"] >= len(self.efforts):
            raise SnapshotError(
                f"the snapshot was taken at effort {about['effort']} and this session has {len(self.efforts)} level(s) "
                "from 0, which is full; on a GPU, load the engine with efforts=True"
            )
        self._director.restore(about["director"])
        with self._closing_on_error():
            self._shared.forget()
            self._lane.restore(self._place, snapshot.tensors)
            self.latents = None if latents is None else latents.to(self.memory.device, copy=True)
        self.seed, self._start, self._index, self._chunks, self._effort = (about[name] for name in COUNTERS)

    def _here(self) -> Snapshot:
        """A snapshot whose tensors are the session's own, and good until it does anything."""
        self._check_open()
        counters = zip(COUNTERS, (int(self.seed), self._start, self._index, self._chunks, self._effort), strict=True)
        latents = {} if self.latents is None else {"latents": self.latents}
        with self._closing_on_error():
            tensors = {**self._lane.state(self._place), **latents}
        if not all(torch.is_tensor(part) for name, part in tensors.items() if name not in POOL):
            raise SnapshotError(
                "the decoder's past is not complete after a single latent frame; take the snapshot a chunk later, or "
                "use chunks of at least 2 latent frames (MemoryConfig.chunk_frames)"
            )
        return Snapshot(self._made_for, {**dict(counters), "director": self._director.about()}, tensors)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        video = self.config.video
        return self.config.model.in_channels, video.latent_height, video.latent_width

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """Close the session when work on a chunk is cut short: its pages and decoder would be half a chunk ahead."""
        with closing_on_error([self], spoils=not self._batched):
            yield

    def next_chunk(self) -> list[Frame]:
        """Generate one chunk and return its frames (9 first, then 12, for a chunk of 3 latent frames).

        Raises CFEngineError on a closed session, what an event pushed earlier turned out to be wrong with, see `push`,
        FaultError for a decoder that fails or latents that are not finite, DeviceError where memory is short. Any
        failure or interruption of the work itself closes the session: there is no going on from half a chunk.
        """
        self._check_alone()
        self._director.edge()
        with self._closing_on_error():
            return self._accept(*self._lane.run([self._step()]))

    def _step(self) -> Step:
        """What the lane shall make next."""
        keys, flush, recache, cut, reset, seed = self._director.take()
        if recache or reset:
            self._shared.forget()
        self._start = 0 if reset else self._start
        self.seed = self.seed if seed is None else seed
        self._cut |= reset
        return Step(self._start, self.seed, keys, flush, cut, recache, reset, self._effort, self._on_device)

    def _accept(self, chunk: Chunk | Exception) -> list[Frame]:
        """Count a chunk that the lane has made.  Raises what went wrong in this session alone."""
        if isinstance(chunk, Exception):
            self._raise(chunk)
        timings = ChunkTimings(
            chunk=self._chunks,
            denoise=chunk.denoise,
            decode=chunk.decode,
            clean=chunk.clean,
            text=self._director.waited(),
            memory=chunk.events,
            recache=chunk.recache,
            events=self._director.receipts(),
            effort=chunk.effort,
            passes=chunk.passes,
            near=chunk.near,
        )
        self.latents = chunk.latents
        self._start += self.config.memory.chunk_frames
        self._chunks += 1
        return self._wrap(chunk.pixels, timings)

    def _wrap(self, pixels: np.ndarray | Tensor, timings: ChunkTimings) -> list[Frame]:
        first, fps = self._index, self.config.video.fps
        self._index += len(pixels)
        told = self._director.last_event_id, self._director.applied_at_chunk
        cut, self._cut = self._cut, False
        return [
            Frame(image, first + i, (first + i) / fps, timings, *told, cut=cut and i == 0)
            for i, image in enumerate(pixels)
        ]

    def _raise(self, error: Exception) -> NoReturn:
        """Raise what went wrong with this session's chunk as an error of ours; of a `recache` it is one already."""
        fault = error if isinstance(error, FaultError) else None
        pages = self.memory.pool.k
        try:
            with device_errors(self.config, pages.device, pages.element_size()):
                raise error if fault is None else fault.__cause__ or fault
        except CFEngineError:
            raise
        except Exception as error:
            raise fault or FaultError(
                f"decoding chunk {self._chunks} failed ({type(error).__name__}: {error}); the session is closed, the "
                "frames before stay good: resume a snapshot, or open another session",
                "decode",
            ) from error

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

    def _check_alone(self) -> None:
        self._check_open()
        if self._batched:
            raise ConfigError("this session is one of a batch that moves in lock-step; ask Batch.next_chunk")

    def close(self) -> None:
        """Give the memory back; the session cannot be used afterwards. Closing twice is harmless."""
        if not self.closed:
            self._lane, self._director, self._resume = None, None, None
            told, self._on_close = self._on_close, None  # a closed session holds nothing of its engine
            told(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def closing_on_error(sessions: list[Session], *, spoils: bool = True) -> Iterator[None]:
    """Close sessions, and for good their lane, when work on a chunk is cut short; one sentence for what a GPU reports.

    sessions: of one lane, open      spoils: False where the lane has others, which go on
    """
    lane, config, keys = sessions[0]._lane, sessions[0].config, sessions[0].memory.pool.k
    try:
        with device_errors(config, keys.device, keys.element_size()):
            yield
    except BaseException:
        if spoils:
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
