"""The writer's side of a frame ring."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from cfengine.embed.device import DeviceFrames
from cfengine.embed.events import Event, typed
from cfengine.embed.names import Flags, Format, Memory, State
from cfengine.embed.native import load
from cfengine.errors import RingError


@dataclass(frozen=True)
class RingStats:
    """Counts since the ring was made.

    published: frames      revoked: frames taken back from readers that were dead or too slow
    refused: frames that found no free slot, which clients of this project cannot cause
    dropped: events of programs that died while they pushed, and damaged ones      readers: programs that read now
    """

    published: int
    revoked: int
    refused: int
    dropped: int
    readers: int


def memory_of(memory: Memory | str) -> Memory:
    """The kind of memory that has this name.  Raises RingError."""
    names = {made.name.lower(): made for made in Memory}
    if isinstance(memory, Memory) or memory in names:
        return memory if isinstance(memory, Memory) else names[memory]
    raise RingError(f"unknown memory {memory!r}; choose one of {', '.join(names)}")


class Ring:
    """A ring of frames in shared memory under a name, which readers of any language find.

        with Ring("demo", width=832, height=480, fps=16) as ring:
            ring.state = State.RUNNING
            for frame in session:
                ring.publish(frame.pixels, chunk=frame.timings.chunk)
                for event in ring.events():
                    ...

    name: up to 64 letters, digits, '-', '_', '.'      fps: frames a second, an integer, a Fraction or a float
    readers: most programs that read at one time, 16 at most
    slots: frames that there is room for, readers + 2 at least; a reader that wants every frame, or the nearest to a
    time, finds the latest slots - readers - 1 or more
    events: events that there is room for, a power of two
    stall: seconds of silence after which readers find a running writer stalled
    memory: where the frames are: "host"; or on the GPU `device`, "opaque_fd" for programs with Vulkan or CUDA,
    "cuda_ipc" for those with CUDA alone; those two need the package cuda-bindings (docs/embed.md, device memory)
    Raises RingError: a living process writes that name, too little shared or device memory, a size that cannot be, or
    a GPU that cannot do it. A ring that a dead process left is replaced; its readers come over by themselves.

    One thread publishes; another may take events. Nothing here waits for a reader. Device memory is given back by
    `close`, and not where a ring is only dropped.
    """

    def __init__(
        self,
        name: str,
        width: int,
        height: int,
        *,
        fps: int | float | Fraction = 16,
        format: Format = Format.RGBA8,
        readers: int = 4,
        slots: int = 24,
        events: int = 64,
        stall: float = 2.0,
        memory: Memory | str = Memory.HOST,
        device: torch.device | str = "cuda",
    ) -> None:
        sizes = {"width": width, "height": height, "readers": readers, "slots": slots, "events": events}
        for key, value in sizes.items():
            if not 0 <= value < 1 << 32:
                raise RingError(f"ring {name}: {key} is {value} but must be positive and have 32 bits; choose another")
        rate = Fraction(fps).limit_denominator(1001)  # 30000/1001 and the like are exact
        if rate <= 0:
            raise RingError(f"ring {name}: {fps} frames a second; choose a positive number")
        self.name, self.width, self.height, self.format, self.fps = name, width, height, Format(format), rate
        self.memory = memory_of(memory)
        about = {
            "name": name,
            "format": int(format),
            "fps_numerator": rate.numerator,
            "fps_denominator": rate.denominator,
            "stall_ns": round(stall * 1e9),
            "memory": int(self.memory),
            **sizes,
        }
        self._device: DeviceFrames | None = None
        if self.memory is not Memory.HOST:
            self._device = DeviceFrames(self.memory, load().ring_frame_stride(**about), slots, device)
        self._filling = threading.Lock()  # device memory goes when no frame is being written
        try:
            self._writer = load().RingWriter(**about, handle_socket=self._device.socket if self._device else "")
            self.generation: int = self._writer.generation()
            if self._device:
                self._device.start(self.generation)
        except BaseException:
            if self._device:
                self._device.close()
            raise

    def publish(
        self,
        pixels: np.ndarray | torch.Tensor,
        *,
        pts_ns: int = 0,
        chunk: int = 0,
        last_event_id: int = 0,
        applied_at_chunk: int | None = None,
        flags: Flags = Flags.NONE,
    ) -> int:
        """Show a frame: copy it into the oldest slot that nobody reads, in the ring's format, and wake readers.

        pixels: (height, width, 3 or 4) uint8 RGB or RGBA, converted in one pass; where the ring is in device memory, a
        tensor on its device, which is read in this thread's current stream and waited for      pts_ns: when it should
        be seen, on the clock of `now_ns`; 0: now      chunk, last_event_id, applied_at_chunk: the chunk that it is of,
        the newest event of this ring that it knows of, and the first chunk that did      flags: REPEATED,
        DISCONTINUITY; LATE is added by itself      -> id of the frame: 1, 2, 3, ...
        Raises RingError for another shape or type, and for a ring that is closed.
        """
        about = pts_ns, chunk, last_event_id, applied_at_chunk or 0, int(flags)
        if self._device:
            with self._filling:
                self._device.check(self.name, pixels, self.width, self.height)
                return self._device.publish(self._writer, pixels, self.format, about)
        if isinstance(pixels, torch.Tensor) and pixels.device.type != "cpu":
            raise RingError(
                f"ring {self.name} was given a frame on {pixels.device}, but its frames are in host memory; give "
                "pixels.cpu(), or make the ring with memory='opaque_fd'"
            )
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
            raise RingError(
                f"ring {self.name} was given a frame of shape {pixels.shape}, {pixels.dtype}; "
                f"give ({self.height}, {self.width}, 3 or 4) uint8"
            )
        if pixels.strides[2] != 1 or pixels.strides[1] != pixels.shape[2] or pixels.strides[0] < 0:
            pixels = np.ascontiguousarray(pixels)
        return self._writer.publish(pixels, *about)

    def events(self) -> list[Event]:
        """Take what clients have pushed since the last call, oldest first."""
        return [typed(*event) for event in self._writer.take_events()]

    @property
    def state(self) -> State:
        """What readers are told; setting it is a sign of life."""
        return State(self._writer.state())

    @state.setter
    def state(self, state: State) -> None:
        self._writer.set_state(int(state))

    def beat(self) -> None:
        """Give a sign of life without a frame."""
        self._writer.beat()

    def stats(self) -> RingStats:
        return RingStats(**self._writer.stats())

    def close(self) -> None:
        """Tell readers that the stream has ended and take the name away; they keep what they have mapped, but for
        memory of "cuda_ipc", which ends here.
        """
        with self._filling:
            self._writer.close()
            if self._device:
                self._device.close()

    @staticmethod
    def unlink(name: str) -> None:
        """Take away the name of a ring whose writer died. RingError where it lives, or there is none."""
        load().ring_unlink(name)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_) -> None:
        self.close()
