"""A lane carries the chunks of one session, or of several in lock-step, from noise to pixels."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cfengine.codec import StreamDecoder
from cfengine.config import EngineConfig
from cfengine.errors import CFEngineError, FaultError
from cfengine.memory.kept import KeptLatents
from cfengine.memory.memory import Memory, Shown
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
    recache: bool = False  # pages are computed again under this prompt first
    reset: bool = False  # everything is forgotten before that
    effort: int = 0  # level of `Schedule.efforts`
    on_device: bool = False  # its frames stay where they are decoded


class Chunk(NamedTuple):
    """What a session gets: pixels (frames, H, W, 3) uint8, latents as `Session.latents`, seconds of `ChunkTimings`."""

    pixels: np.ndarray | Tensor  # a tensor where the step was `on_device`
    latents: Tensor
    denoise: float
    decode: float
    clean: float
    events: LayerEvents
    recache: float
    effort: int
    passes: int
    near: bool


class Lane(Protocol):
    """Interface of every lane; steps have one entry a session, in the order of their places."""

    memories: list[Memory]  # by place; none once it is closed
    costs: tuple[float, ...]  # of a chunk at each level of effort, see `Schedule.costs`

    def run(self, steps: list[Step]) -> list[Chunk | Exception]:
        """Generate the next chunk of every session.

        Sessions share their passes, which are those of the one that asks for the most. An exception is what went wrong
        in one session alone, whose decoder or `recache` failed or whose latents are not finite; the others go on.
        """
        ...

    def leave(self, place: int) -> None:
        """Let go of one session and give its pages back; the one in the last place takes over its place."""
        ...

    def prime(self, step: Step, latents: Tensor) -> int:
        """Take the latents of a chunk as given; returns how many video frames they stand for."""
        ...

    def state(self, place: int) -> dict[str, Tensor]:
        """All that a session has become, by name, not copied; everything that is due or queued is done first."""
        ...

    def parts(self, place: int) -> dict[str, Tensor]:
        """`state` without the decoder's past, as it is now: shapes and types to hold another against."""
        ...

    def restore(self, place: int, state: dict[str, Tensor]) -> None:
        """Make a session what `state` of one of the same configuration said; done when this returns."""
        ...

    def close(self) -> None:
        """Let go of pages and decoders."""
        ...


def named(memory: Memory, kept: KeptLatents, shown: Shown, past: dict[int, Tensor]) -> dict[str, Tensor]:
    """The parts of a session's state under one roof: `part.name`.  past: of the decoder, by place"""
    parts = {"memory": memory.tensors(), "kept": kept.tensors(), "shown": shown._asdict(), "decoder": past}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def part_of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """What `named` was given as one part; keys of the decoder's are strings now."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def shown_in(state: dict[str, Tensor]) -> Shown:
    """The point that events are counted from, in host memory."""
    return Shown(**{name: tensor.to("cpu", copy=True) for name, tensor in part_of(state, "shown").items()})


def shared_effort(steps: list[Step]) -> int:
    """Level of the passes that steps share: that of the session that asks for the most."""
    return min(step.effort for step in steps)


def not_finite(latents: Tensor) -> FaultError:
    """What a session is told whose latents hold NaN or infinity; it may be on the way already."""
    return FaultError(
        f"the chunk's latents of shape {tuple(latents.shape)} are not all finite, and so would be no later page; "
        "the session is closed, the frames before stay good: resume a snapshot, or open another with a new seed",
        "latents",
    )


def recached(
    scheduler: ChunkScheduler, memory: Memory, cross: list[CrossCache], kept: KeptLatents
) -> FaultError | None:
    """Compute a session's pages again; returns what went wrong, with its cause, which is that session's alone."""
    try:
        scheduler.recache(memory, cross, kept)
    except Exception as error:
        fault = FaultError(
            f"computing the pages again under a new prompt failed ({type(error).__name__}: {error}); the session is "
            "closed, the frames before stay good: resume a snapshot, or open another session",
            "recache",
        )
        fault.__cause__ = error
        return fault
    return None


class HostLane:
    """Pass by pass, as the host asks for it: on a CPU nothing overlaps, so the clean pass waits until it is needed."""

    def __init__(self, scheduler: ChunkScheduler, config: EngineConfig) -> None:
        self.memories: list[Memory] = []
        self._scheduler, self.costs = scheduler, scheduler.schedule.costs
        self._decoders: list[StreamDecoder] = []
        self._frames = config.memory.chunk_frames
        self._shape = config.model.in_channels, config.video.latent_height, config.video.latent_width
        self._kept: list[KeptLatents] = []
        self._owed: list[tuple[Step, Tensor]] = []  # of the chunk whose clean pass is due: latents of every session
        self._cut_short: BaseException | None = None  # what that pass raised, half of whose pages are written
        self._paid = 0.0  # seconds of a clean pass that ran since, before it was due
        self._shown: list[Shown] = []

    def join(self, memory: Memory, kept: KeptLatents, decoder: StreamDecoder) -> int:
        """Take in another session, all its parts new; returns its place, the last.  Raises CapacityError."""
        self._paid += self._pay()  # which the others owe
        memory.open()
        try:
            memory.reset()
            kept.reset()
            shown = memory.show()
        except BaseException:
            memory.close()
            raise
        for parts, part in zip(self._parts(), (memory, kept, decoder, shown), strict=True):
            parts.append(part)
        return len(self.memories) - 1

    def leave(self, place: int) -> None:
        """See `Lane.leave`; the clean pass that this session owes is not run."""
        self.memories[place].close()
        for parts in (*self._parts(), *([self._owed] if self._owed else [])):
            parts[place] = parts[-1]
            parts.pop()

    def _parts(self) -> tuple[list, ...]:
        return self.memories, self._kept, self._decoders, self._shown

    def run(self, steps: list[Step]) -> list[Chunk | Exception]:
        """See `Lane.run`."""
        if len(steps) == 1 and steps[0].reset:
            self._owed = []  # nobody will see what it would leave
        with span("clean"):
            clean, self._paid = self._paid + self._pay(), 0.0
        paid = time.perf_counter()
        failed: dict[int, FaultError | None] = {}
        for place, (memory, step) in enumerate(zip(self.memories, steps, strict=True)):
            if step.reset:
                self._reset(place)
            if step.opens:
                memory.flush()
            if step.recache:  # one that fails goes on through the passes, for the others
                failed[place] = recached(self._scheduler, memory, step.cross, self._kept[place])
        began = time.perf_counter()
        memory, start, cut, cross = self._joined(steps)
        effort = shared_effort(steps)
        with span("denoise"):
            x0 = self._scheduler.denoise(memory, cross, start, lambda i: self._noise(steps, i), cut=cut, effort=effort)
        denoised = time.perf_counter()
        parts = x0.chunk(len(steps))
        with span("decode"):
            pixels = [_decoded(*pair) for pair in zip(self._decoders, parts, strict=True)]
        decoded = time.perf_counter()
        self._owed, self._cut_short = list(zip(steps, parts, strict=True)), None
        self._keep(steps, parts)
        seconds = denoised - began, decoded - denoised, clean
        recache = began - paid if any(step.recache for step in steps) else 0.0
        pixels = [failed.get(place) or made for place, made in enumerate(pixels)]
        made = zip(pixels, parts, self._events(), strict=True)
        level = self._scheduler.schedule.efforts[effort]
        told = effort, len(level.passes), level.near
        return [
            pixels if isinstance(pixels, Exception) else Chunk(pixels, part, *seconds, event, recache, *told)
            for pixels, part, event in made
        ]

    @torch.inference_mode()
    def _reset(self, place: int) -> None:
        """Make a session what a new one is."""
        memory, decoder = self.memories[place], self._decoders[place]
        memory.restart()
        self._kept[place].reset()
        self._shown[place], decoder.state = memory.show(), {}

    def prime(self, step: Step, latents: Tensor) -> int:
        """See `Lane.prime`."""
        self._pay()
        self._scheduler.clean_pass(self.memories[0], step.cross, step.start, latents)
        self._keep([step], (latents,))
        self._events()
        return len(self._decoders[0].decode(latents))

    def _joined(self, steps: list[Step]):
        return joined(self.memories, [s.start for s in steps], [s.cut for s in steps], [s.cross for s in steps])

    def _noise(self, steps: list[Step], i: int) -> Tensor:
        return torch.cat([chunk_noise(step.seed, step.start, self._frames, i, self._shape) for step in steps])

    @torch.inference_mode()
    def _keep(self, steps: list[Step], parts: tuple[Tensor, ...]) -> None:
        for kept, step, part, shown in zip(self._kept, steps, parts, self._shown, strict=True):
            kept.put(step.start, part, shown)

    def _events(self) -> list[LayerEvents]:
        """What each memory did since this was last asked."""
        before, self._shown = self._shown, [memory.show() for memory in self.memories]
        return [old.events_until(new) for old, new in zip(before, self._shown, strict=True)]

    def _pay(self) -> float:
        """Run the clean pass that the last chunk still owes; returns the seconds that it took.

        One that was cut short is not run again: memories have changed, and whoever shares it cannot go on.
        """
        if not self._owed:
            return 0.0
        if self._cut_short is not None:
            raise CFEngineError(
                f"the clean pass that these sessions share was cut short ({self._cut_short!r}), so none of them can go "
                "on; open others, or resume snapshots taken before"
            ) from self._cut_short
        began = time.perf_counter()
        steps, parts = zip(*self._owed, strict=True)
        memory, start, cut, cross = self._joined(steps)
        try:
            self._scheduler.clean_pass(memory, cross, start, torch.cat(parts), cut=cut)
        except BaseException as error:
            self._cut_short = error
            raise
        self._owed = []
        return time.perf_counter() - began

    def state(self, place: int) -> dict[str, Tensor]:
        """See `Lane.state`; the clean pass that is owed runs now, and the next chunk does not pay for it again."""
        self._paid += self._pay()
        return named(self.memories[place], self._kept[place], self._shown[place], self._decoders[place].state)

    def parts(self, place: int) -> dict[str, Tensor]:
        """See `Lane.parts`."""
        return named(self.memories[place], self._kept[place], self._shown[place], {})

    @torch.inference_mode()
    def restore(self, place: int, state: dict[str, Tensor]) -> None:
        """See `Lane.restore`."""
        if len(self.memories) > 1:
            self._paid += self._pay()  # of the other sessions
        self._owed = []
        memory = self.memories[place]
        memory.load(part_of(state, "memory"))
        self._kept[place].load(part_of(state, "kept"))
        self._shown[place] = shown_in(state)
        past = part_of(state, "decoder").items()
        self._decoders[place].state = {int(number): tensor.to(memory.device, copy=True) for number, tensor in past}

    def close(self) -> None:
        """See `Lane.close`."""
        for memory in self.memories:
            memory.close()
        self.memories, self._decoders, self._kept, self._shown, self._owed = [], [], [], [], []
        self._scheduler = None  # which has the weights


def _decoded(decoder: StreamDecoder, latents: Tensor) -> np.ndarray | Exception:
    """Frames, or what is wrong with the latents or was raised by the decoder: that is one session's alone."""
    if not torch.isfinite(latents).all():
        return not_finite(latents)
    try:
        return decoder.decode(latents)
    except Exception as error:
        return error
