"""The lane on a GPU: graphs replayed on two streams, and a host that waits for frames alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfengine.codec import StreamDecoder
from cfengine.config import EngineConfig
from cfengine.memory.kept import KeptLatents
from cfengine.memory.memory import Memory, Shown
from cfengine.ranges import span
from cfengine.scheduler.batch import alone
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.lane import Chunk, Step, check_steps, named, part_of, shown_in
from cfengine.scheduler.program import ChunkProgram, DecodeProgram
from cfengine.scheduler.sampler import counter_noise


@dataclass
class Marks:
    """Events of one chunk, in the order in which a GPU passes them; cleaned and decoded on two streams."""

    opened: Any  # pages that a prompt asks for are computed again from here on
    began: Any
    denoised: Any
    taken: Any  # the decoder has its own copy of the latents
    decoded: Any  # frames are in host memory
    cleaned: Any


class NoiseAhead:
    """Noise of the next chunk, drawn in pinned memory while the GPU works on this one.

    Two buffers in turn: the copy out of one may still be queued while the other is filled.
    """

    def __init__(self, buffers: list[Tensor], frames: int) -> None:
        """buffers: two of (steps, sessions * frames, channels, height, width) float32."""
        self._buffers, self._frames, self._turn = buffers, frames, 0
        self._drawn: list[tuple[int, int]] | None = None

    def take(self, wanted: list[tuple[int, int]]) -> Tensor:
        """Noise for one (seed, first latent frame) a session."""
        if self._drawn != wanted:
            self.draw(wanted)
        return self._buffers[self._turn]

    def draw(self, wanted: list[tuple[int, int]]) -> None:
        self._turn, self._drawn = 1 - self._turn, None  # until all of it is there
        for step, noise in enumerate(self._buffers[self._turn]):
            for place, out in enumerate(noise):
                seed, first = wanted[place // self._frames]
                counter_noise(seed, first + place % self._frames, step, tuple(out.shape), out)
        self._drawn = wanted


@dataclass
class HostBuffers:
    """What comes back from the device for one chunk, in pinned memory; one entry a session."""

    frames: list[Tensor]
    shown: list[Shown]
    counts: list[int]  # frames in use


class DeviceLane:
    """See `Lane`. Everything is allocated, warmed up and captured here; a chunk then only fills, replays and waits.

    Since that takes seconds, a lane outlives its sessions: `reset` makes it new, `expect` names who comes next.

    compute:  noise in | denoise graph | tables out | clean graph | ...
    decoding:                          | decoder graph | frames out |
    """

    def __init__(
        self,
        scheduler: ChunkScheduler,
        config: EngineConfig,
        memories: list[Memory],
        decoders: list[StreamDecoder],
        seeds: list[int],
        runtime: Any,
    ) -> None:
        """seeds: see `expect`      runtime: a `CudaRuntime`, or what does without a GPU what it does."""
        self.memories, self._runtime, self._scheduler = memories, runtime, scheduler
        video, frames = config.video, config.memory.chunk_frames
        self._frames = frames
        with runtime.on(runtime.compute), torch.inference_mode():
            self._program = program = ChunkProgram(scheduler, config, memories)
            self._run_denoise, self._run_clean = self._capture(program.denoise, program.clean, runtime.compute)
            self._kept = [KeptLatents(config, memory.device) for memory in memories]
        with runtime.on(runtime.decoding), torch.inference_mode():
            parts = program.x0.chunk(len(memories))
            self._decode = [DecodeProgram(*pair) for pair in zip(decoders, map(torch.zeros_like, parts), strict=True)]
            self._draw = [self._capture(each.first, each.later, runtime.decoding) for each in self._decode]
        shape = (frames * video.temporal_stride, video.height, video.width, 3)
        self._host = [self._host_buffers(shape) for _ in range(2)]
        noise = program.noise
        self._noise = NoiseAhead([runtime.pinned(tuple(noise.shape), noise.dtype) for _ in range(2)], frames)
        self._marks = [Marks(*(runtime.event() for _ in range(6))) for _ in range(2)]
        self.reset()
        self.expect(seeds)

    def _capture(self, first: Any, second: Any, stream: Any) -> tuple[Any, Any]:
        """Both calls captured; they run once before: a capture can neither compile kernels nor compute constants."""
        first()
        second()
        return self._runtime.capture(first, stream), self._runtime.capture(second, stream)

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget what was, so that new sessions find what a new lane shows them; waits for what is queued.

        Decoders need no word: a first chunk reads no past, and writes all of it for those that follow.
        """
        self._wait()
        with self._runtime.on(self._runtime.compute):
            for memory in self.memories:
                memory.reset()
            self._shown = [memory.show() for memory in self.memories]
        for prompt, kept in zip(self._program.prompts, self._kept, strict=True):
            prompt.forget()
            kept.reset()
        self._begun = [False] * len(self.memories)  # decoders that have a past
        self._chunks = 0  # launched since, given ones included
        self._cleaned: Marks | None = None  # of the chunk before, if it was generated

    def expect(self, seeds: list[int]) -> None:
        """Draw the noise of the first chunk of new sessions, one seed each."""
        self._noise.draw([(seed, 0) for seed in seeds])

    def _wait(self) -> None:
        for stream in (self._runtime.compute, self._runtime.decoding):
            stream.synchronize()

    def _host_buffers(self, shape: tuple[int, ...]) -> HostBuffers:
        pinned = self._runtime.pinned
        shown = [Shown(*(pinned(tuple(t.shape), t.dtype) for t in memory.shown())) for memory in self.memories]
        return HostBuffers([pinned(shape, torch.uint8) for _ in self.memories], shown, [0] * len(self.memories))

    @torch.inference_mode()
    def run(self, steps: list[Step]) -> list[Chunk]:
        """See `Lane.run`. The clean pass is queued at once, so the last chunk of a stream pays for it."""
        check_steps(steps, len(self.memories))
        with span(f"chunk at frame {steps[0].start}"):
            latents = self._launch(steps)
            self._runtime.lend(latents)
            self._noise.draw([(step.seed, step.start + self._frames) for step in steps])
            return self._collect(latents, any(step.recache for step in steps))

    def _launch(self, steps: list[Step]) -> Tensor:
        """Queue a chunk; returns its latents, (sessions * frames, channels, height, width), on the way."""
        runtime, program, marks, host = self._runtime, self._program, self._turn(0), self._host[self._chunks % 2]
        noise = self._noise.take([(step.seed, step.start) for step in steps])
        with runtime.on(runtime.compute):
            self._set(steps)
            program.noise.copy_(noise, non_blocking=True)
            marks.opened.record()
            for place, step in enumerate(steps):
                if step.opens:
                    self.memories[place].flush()
                if step.recache:
                    self._recache(place)
            marks.began.record()
            with span("denoise"):
                self._run_denoise()
            latents = program.x0.clone()
            self._keep(steps)
            for memory, shown in zip(self.memories, host.shown, strict=True):
                memory.show(shown)
            marks.denoised.record()
        self._queue_decode(marks, host)
        with runtime.on(runtime.compute), span("clean"):
            self._run_clean()
            marks.cleaned.record()
        return latents

    def _recache(self, place: int) -> None:
        """Compute a session's pages again, not from a graph: how many passes it takes differs. Waits for its tables."""
        cross = alone(self._program.prompts[place].layers, len(self.memories))
        self._scheduler.recache(self.memories[place], cross, self._kept[place])

    def _keep(self, steps: list[Step]) -> None:
        """Keep the latents of a chunk on the way; what the memory showed of the chunk before, the host knows."""
        parts = self._program.x0.chunk(len(steps))
        for kept, step, part, shown in zip(self._kept, steps, parts, self._shown, strict=True):
            kept.put(step.start, part, shown)

    def _turn(self, back: int) -> Marks:
        return self._marks[(self._chunks - back) % 2]

    def _set(self, steps: list[Step]) -> None:
        """Tell the passes what comes; x0 is theirs again once the decoders have taken it."""
        if self._chunks:
            self._runtime.compute.wait_event(self._turn(1).taken)
        for place, step in enumerate(steps):
            self._program.set(place, step.start, step.cut, step.cross)

    def _queue_decode(self, marks: Marks, host: HostBuffers) -> None:
        """Latents to frames in host memory, on the other stream, from `marks.denoised` on."""
        runtime = self._runtime
        with runtime.on(runtime.decoding), span("decode"):
            runtime.decoding.wait_event(marks.denoised)
            for program, part in zip(self._decode, self._program.x0.chunk(len(self.memories)), strict=True):
                program.latents.copy_(part)
            marks.taken.record()
            for place, (first, later) in enumerate(self._draw):
                frames = later() if self._begun[place] else first()
                self._begun[place], host.counts[place] = True, len(frames)
                host.frames[place][: len(frames)].copy_(frames, non_blocking=True)
            marks.decoded.record()

    def _collect(self, latents: Tensor, recached: bool) -> list[Chunk]:
        """Wait for the frames of the chunk just launched; its clean pass may go on."""
        marks, host, before = self._turn(0), self._host[self._chunks % 2], self._cleaned
        marks.decoded.synchronize()
        denoise, decode = _seconds(marks.began, marks.denoised), _seconds(marks.denoised, marks.decoded)
        clean = _seconds(before.denoised, before.cleaned) if before else 0.0
        recache = _seconds(marks.opened, marks.began) if recached else 0.0
        events = [old.events_until(new) for old, new in zip(self._shown, host.shown, strict=True)]
        pixels: list[np.ndarray] = [
            frames[:count].numpy().copy() for frames, count in zip(host.frames, host.counts, strict=True)
        ]
        self._shown, self._cleaned = host.shown, marks
        self._chunks += 1
        made = zip(pixels, latents.chunk(len(self.memories)), events, strict=True)
        return [Chunk(*each, denoise, decode, clean, event, recache) for *each, event in made]

    @torch.inference_mode()
    def prime(self, step: Step, latents: Tensor) -> int:
        """See `Lane.prime`; waits until it is done."""
        check_steps([step], len(self.memories))
        runtime, marks, host = self._runtime, self._turn(0), self._host[self._chunks % 2]
        runtime.join()  # the latents are the caller's
        with runtime.on(runtime.compute):
            self._set([step])
            self._program.x0.copy_(latents)
            self._keep([step])
            marks.denoised.record()
        self._queue_decode(marks, host)
        with runtime.on(runtime.compute):
            self._run_clean()
            self._shown = [memory.show(shown) for memory, shown in zip(self.memories, host.shown, strict=True)]
            marks.cleaned.record()
        for event in (marks.decoded, marks.cleaned):
            event.synchronize()
        self._chunks, self._cleaned = self._chunks + 1, None
        return host.counts[0]

    def state(self, place: int) -> dict[str, Tensor]:
        """See `Lane.state`."""
        self._wait()
        past = self._decode[place].past if self._begun[place] else {}
        return named(self.memories[place], self._kept[place], self._shown[place], past)

    def parts(self, place: int) -> dict[str, Tensor]:
        """See `Lane.parts`."""
        return named(self.memories[place], self._kept[place], self._shown[place], {})

    @torch.inference_mode()
    def restore(self, place: int, state: dict[str, Tensor]) -> None:
        """See `Lane.restore`."""
        self._wait()
        runtime, past = self._runtime, part_of(state, "decoder")
        runtime.join()  # the state is the caller's
        with runtime.on(runtime.compute):
            self.memories[place].load(part_of(state, "memory"))
            self._kept[place].load(part_of(state, "kept"))
            self._decode[place].load({int(number): tensor for number, tensor in past.items()})
        self._begun[place], self._cleaned = bool(past), None
        self._shown = [shown_in(state) if i == place else shown for i, shown in enumerate(self._shown)]
        self._wait()

    def close(self) -> None:
        """See `Lane.close`; what is still queued is waited for, since it reads what is let go."""
        with suppress(RuntimeError):  # a lost GPU has nothing left to wait for
            self._wait()
        self.memories, self._decode, self._draw, self._kept, self._program = [], [], [], [], None
        self._run_denoise = self._run_clean = None


def _seconds(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) / 1e3
