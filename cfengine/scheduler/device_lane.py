"""The lane on a GPU: graphs replayed on two streams, and a host that waits for frames alone."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cfengine.codec import StreamDecoder
from cfengine.config import EngineConfig
from cfengine.errors import CapacityError, FaultError
from cfengine.memory.kept import KeptLatents
from cfengine.memory.memory import Memory, Shown
from cfengine.ranges import span
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.lane import Chunk, Step, named, not_finite, part_of, recached, shared_effort, shown_in
from cfengine.scheduler.noise import NoiseAhead
from cfengine.scheduler.program import ChunkProgram, DecodeProgram


@dataclass
class Marks:
    """Events of one chunk, in the order in which a GPU passes them; cleaned and decoded on two streams."""

    opened: Any  # pages that a prompt asks for are computed again from here on
    began: Any
    denoised: Any
    taken: Any  # the decoder has its own copy of the latents
    decoded: Any  # frames are in host memory, or where they stay
    cleaned: Any


@dataclass
class HostBuffers:
    """What comes back from the device for one chunk, in pinned memory; one entry a place."""

    frames: list[Tensor]
    shown: list[Shown]
    finite: Tensor  # (places,) bool, of the latents
    drawn: list[Tensor | Exception]  # those of `frames` in use, or frames on the device, or what its decoder raised


class DeviceLane:
    """See `Lane`. Everything is allocated, warmed up and captured here; a chunk then only fills, replays and waits.

    It has room for as many sessions as it was given memories. Those that are open have the first places, and the passes
    of every number of sessions are captured, at every level of effort that the schedule has. Since that takes seconds,
    a lane outlives its sessions: `reset` makes it new, `join` opens the next.

    compute:  noise in | denoise graph | tables out | clean graph | ...
    decoding:                          | decoder graph | frames out |
    """

    def __init__(
        self,
        scheduler: ChunkScheduler,
        config: EngineConfig,
        memories: list[Memory],
        decoders: list[StreamDecoder],
        runtime: Any,
    ) -> None:
        """memories: of one budget, where several      runtime: a `CudaRuntime`, or what does its work without a GPU."""
        self.memories, self._runtime, self._scheduler = memories, runtime, scheduler
        self.costs = scheduler.schedule.costs
        lease = memories[0].lease
        self._order = nullcontext() if lease is None else lease.budget.lock  # passes change what a budget counts
        self.kind = config.memory, len(memories)  # lanes of a kind can stand in for one another
        video, frames = config.video, config.memory.chunk_frames
        self._frames = frames
        with runtime.on(runtime.compute), torch.inference_mode():
            self._program = program = ChunkProgram(scheduler, config, memories)
            self._parts = {count: program.part(count) for count in range(len(memories), 0, -1)}  # largest first: memory
            self._passes = {
                n: self._capture(part.denoise, part.clean, runtime.compute) for n, part in self._parts.items()
            }
            self._reduced = {
                (n, effort): self._capture_one(partial(part.denoise, effort), runtime.compute)
                for n, part in self._parts.items()
                for effort in range(1, len(self.costs))
            }
            memories[0].pool.clear_zero()  # which memories without pages have written
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

    def _capture(self, first: Any, second: Any, stream: Any) -> tuple[Any, Any]:
        """Both calls captured; they run once before: a capture can neither compile kernels nor compute constants."""
        first()
        second()
        return self._runtime.capture(first, stream), self._runtime.capture(second, stream)

    def _capture_one(self, call: Any, stream: Any) -> Any:
        call()
        return self._runtime.capture(call, stream)

    @torch.inference_mode()
    def reset(self) -> None:
        """Let all sessions go, and give their pages back; waits for what is queued."""
        self._wait()
        with self._runtime.on(self._runtime.compute):
            for memory in self.memories:
                memory.close()
        for prompt in self._program.prompts:
            prompt.forget()
        self._shown: list[Shown] = []  # one a session
        self._begun: list[bool] = []  # decoders that have a past
        self._chunks = 0  # launched since, given ones included
        self._cleaned: Marks | None = None  # of the chunk before, if it was generated
        self._failed: dict[int, FaultError | None] = {}  # by place, of the chunk launched: a `recache`

    @torch.inference_mode()
    def join(self) -> int:
        """Take in another session, which finds what one on a new lane finds; returns its place, the last.

        Raises CapacityError. Decoders need no word: a first chunk reads no past, and writes all of it for the next.
        """
        place, room = len(self._shown), len(self.memories)
        if place == room:
            raise CapacityError(
                f"the graphs of this batch were captured for {room} sessions and {place} are open; close one, or load "
                f"the engine with max_sessions={room + 1} or more"
            )
        memory = self.memories[place]
        with self._runtime.on(self._runtime.compute):
            memory.open()
            memory.reset()
            self._kept[place].reset()
            self._shown.append(memory.show())
        self._program.prompts[place].forget()
        self._begun.append(False)
        return place

    @torch.inference_mode()
    def leave(self, place: int) -> None:
        """See `Lane.leave`; waits for what is queued. Pages stay where they are, tables and what decoders keep move."""
        self._wait()
        last, runtime = len(self._shown) - 1, self._runtime
        with runtime.on(runtime.compute):
            self.memories[place].close()
            if place != last:
                self.memories[place].take_over(self.memories[last])
                self._kept[place].load(self._kept[last].tensors())
                self._decode[place].load(self._decode[last].past)
        self._program.prompts[last].forget()
        for parts in (self._shown, self._begun):
            parts[place] = parts[-1]
            parts.pop()
        self._wait()

    def expect(self, seeds: list[int]) -> None:
        """Draw the noise of the first chunk of new sessions, one seed each."""
        self._noise.draw([(seed, 0) for seed in seeds])

    def _wait(self) -> None:
        for stream in (self._runtime.compute, self._runtime.decoding):
            with self._runtime.on(stream):
                stream.synchronize()

    def _host_buffers(self, shape: tuple[int, ...]) -> HostBuffers:
        pinned = self._runtime.pinned
        shown = [Shown(*(pinned(tuple(t.shape), t.dtype) for t in memory.shown())) for memory in self.memories]
        finite = pinned((len(self.memories),), torch.bool)
        frames = [pinned(shape, torch.uint8) for _ in self.memories]
        return HostBuffers(frames, shown, finite, list(frames))

    @torch.inference_mode()
    def run(self, steps: list[Step]) -> list[Chunk | Exception]:
        """See `Lane.run`. The clean pass is queued at once, so the last chunk of a stream pays for it."""
        with span(f"chunk at frame {steps[0].start}"):
            latents = self._launch(steps)
            self._runtime.lend(latents)
            self._noise.draw([(step.seed, step.start + self._frames) for step in steps])
            return self._collect(latents, steps)

    def _launch(self, steps: list[Step]) -> Tensor:
        """Queue a chunk; returns its latents, (sessions * frames, channels, height, width), on the way."""
        runtime, marks, host = self._runtime, self._turn(0), self._host[self._chunks % 2]
        program, (denoise, clean) = self._parts[len(steps)], self._passes[len(steps)]
        denoise = self._reduced.get((len(steps), shared_effort(steps)), denoise)
        noise = self._noise.take([(step.seed, step.start) for step in steps])
        with runtime.on(runtime.compute):
            self._set(steps)
            for place, drawn in zip(program.noise, noise, strict=True):  # each in one piece, so that nobody waits
                place.copy_(drawn, non_blocking=True)
            marks.opened.record()
            self._failed = {}
            for place, step in enumerate(steps):
                if step.reset:
                    self._restart(place)
                if step.opens:
                    self.memories[place].flush()
                if step.recache:  # one that fails goes on through the passes, for the others
                    self._failed[place] = self._recache(place)
            marks.began.record()
            with span("denoise"):
                with self._order:
                    denoise()
            latents = program.x0.clone()
            self._keep(steps)
            for place in range(len(steps)):
                self.memories[place].show(host.shown[place])
            host.finite[: len(steps)].copy_(program.finite, non_blocking=True)
            marks.denoised.record()
        self._queue_decode(marks, host, steps)
        with runtime.on(runtime.compute), span("clean"):
            with self._order:
                clean()
            marks.cleaned.record()
        return latents

    def _restart(self, place: int) -> None:
        """Make a session what a new one is; its decoder's first chunk reads no past. Waits for its tables."""
        self.memories[place].restart()
        self._kept[place].reset()
        self._shown[place], self._begun[place] = self.memories[place].show(), False

    def _recache(self, place: int) -> FaultError | None:
        """Compute a session's pages again, not from a graph: how many passes it takes differs. Waits for its tables."""
        cross = self._program.prompts[place].layers
        return recached(self._scheduler, self.memories[place], cross, self._kept[place])

    def _keep(self, steps: list[Step]) -> None:
        """Keep the latents of a chunk on the way; what the memory showed of the chunk before, the host knows."""
        parts = self._program.x0.split(self._frames)
        for place, (step, shown) in enumerate(zip(steps, self._shown, strict=True)):
            self._kept[place].put(step.start, parts[place], shown)

    def _turn(self, back: int) -> Marks:
        return self._marks[(self._chunks - back) % 2]

    def _set(self, steps: list[Step]) -> None:
        """Tell the passes what comes; x0 is theirs again once the decoders have taken it."""
        if self._chunks:
            self._runtime.compute.wait_event(self._turn(1).taken)
        for place, step in enumerate(steps):
            self._program.set(place, step.start, step.cut, step.cross)

    def _queue_decode(self, marks: Marks, host: HostBuffers, steps: list[Step]) -> None:
        """Latents to frames, in host memory or in tensors of their own, on the other stream after `marks.denoised`."""
        runtime = self._runtime
        with runtime.on(runtime.decoding), span("decode"):
            runtime.decoding.wait_event(marks.denoised)
            for place, part in enumerate(self._program.x0.split(self._frames)[: len(self._begun)]):
                self._decode[place].latents.copy_(part)
            marks.taken.record()
            for place, step in enumerate(steps):
                try:
                    host.drawn[place] = self._drawn(place, None if step.on_device else host.frames[place])
                except Exception as error:  # of one session alone
                    host.drawn[place] = error
            marks.decoded.record()

    def _drawn(self, place: int, out: Tensor | None) -> Tensor:
        """Queue the frames of a session; returns them as they will be, in `out`, or on the device as their owner's."""
        first, later = self._draw[place]
        frames = later() if self._begun[place] else first()
        self._begun[place] = True
        return frames.clone() if out is None else out[: len(frames)].copy_(frames, non_blocking=True)

    def _collect(self, latents: Tensor, steps: list[Step]) -> list[Chunk | Exception]:
        """Wait for the frames of the chunk just launched; its clean pass may go on."""
        effort = shared_effort(steps)
        marks, host, before = self._turn(0), self._host[self._chunks % 2], self._cleaned
        marks.decoded.synchronize()
        denoise, decode = _seconds(marks.began, marks.denoised), _seconds(marks.denoised, marks.decoded)
        clean = _seconds(before.denoised, before.cleaned) if before else 0.0
        recache = _seconds(marks.opened, marks.began) if any(step.recache for step in steps) else 0.0
        shown, self._shown = self._shown, host.shown[: len(self._shown)]
        events = [old.events_until(new) for old, new in zip(shown, self._shown, strict=True)]
        self._cleaned = marks
        self._chunks += 1
        made: list[Chunk | Exception] = []
        level = self._scheduler.schedule.efforts[effort]
        told = effort, len(level.passes), level.near
        for place, (part, event) in enumerate(zip(latents.split(self._frames), events, strict=True)):
            frames, host.drawn[place] = host.drawn[place], host.frames[place]  # what stays on the device is its owner's
            if (failed := self._failed.get(place)) is not None:
                made.append(failed)
            elif not host.finite[place]:
                made.append(not_finite(part))
            elif isinstance(frames, Exception):
                made.append(frames)
            else:
                if steps[place].on_device:
                    self._runtime.lend(frames)
                pixels = frames if steps[place].on_device else frames.numpy().copy()
                made.append(Chunk(pixels, part, denoise, decode, clean, event, recache, *told))
        return made

    @torch.inference_mode()
    def prime(self, step: Step, latents: Tensor) -> int:
        """See `Lane.prime`; waits until it is done."""
        runtime, marks, host = self._runtime, self._turn(0), self._host[self._chunks % 2]
        runtime.join()  # the latents are the caller's
        with runtime.on(runtime.compute):
            self._set([step])
            self._program.x0.copy_(latents)
            self._keep([step])
            marks.denoised.record()
        self._queue_decode(marks, host, [step])
        with runtime.on(runtime.compute):
            with self._order:
                self._passes[1][1]()
            self._shown = [self.memories[0].show(host.shown[0])]
            marks.cleaned.record()
        for event in (marks.decoded, marks.cleaned):
            event.synchronize()
        self._chunks, self._cleaned = self._chunks + 1, None
        if isinstance(host.drawn[0], Exception):
            raise host.drawn[0]
        return len(host.drawn[0])

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
            with self._runtime.on(self._runtime.compute):  # before whoever opens a session next looks for free pages
                for memory in self.memories:
                    memory.close()
        self.memories, self._decode, self._draw, self._kept, self._program = [], [], [], [], None
        self._parts, self._passes, self._reduced, self._scheduler = {}, {}, {}, None


def _seconds(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) / 1e3
