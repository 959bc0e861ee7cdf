"""The reader's side of a frame ring, over the C client: for tests and tools."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor

from cfengine.embed.cuda_memory import DeviceHandle
from cfengine.embed.device import planes_in
from cfengine.embed.events import PLAIN_KINDS, ActionEvent, Event, PoseEvent, PromptEvent
from cfengine.embed.names import Flags, Format, Memory, Policy, State
from cfengine.embed.native import load
from cfengine.errors import RingError


@dataclass(frozen=True)
class RingState:
    """How the writer does, and what the ring holds.

    generation: another number after each restart of the writer      heartbeat_ns: its last sign of life
    newest_id: of the newest frame, 0 where there is none
    """

    state: State
    writer_alive: bool
    generation: int
    heartbeat_ns: int
    newest_id: int
    format: Format
    memory: Memory
    width: int
    height: int
    fps: Fraction
    slots: int
    readers: int


@dataclass(frozen=True, eq=False)
class RingFrame:
    """A frame that is pinned until it is released; a context manager that does so.

    planes: read-only views of the ring's own memory, of RGBA8 one (height, width, 4), of NV12 (height, width) and
    (height / 2, width / 2, 2). After the release they still may be read, and show whatever the slot holds by then.
    None where the frame is in device memory: each plane then begins at its offset, with so many bytes a row, in the
    memory of `Reader.device_memory`, if that has this generation.
    """

    reader: Reader
    id: int
    generation: int
    pts_ns: int
    ready_ns: int
    chunk: int
    last_event_id: int
    applied_at_chunk: int
    flags: Flags
    format: Format
    memory: Memory
    width: int
    height: int
    offsets: tuple[int, int]
    strides: tuple[int, int]
    planes: tuple[np.ndarray, ...]

    @property
    def pixels(self) -> np.ndarray:
        """The first plane; RingError where it is in device memory."""
        if not self.planes:
            raise RingError(
                f"frame {self.id} is in device memory ({self.memory.name.lower()}); map Reader.device_memory() and see "
                "RingFrame.planes_in"
            )
        return self.planes[0]

    def planes_in(self, memory: Tensor) -> tuple[Tensor, ...]:
        """Its planes as views of device memory that was mapped. memory: all of it, (bytes,) uint8"""
        return planes_in(memory, self.format, self.width, self.height, self.offsets, self.strides)

    def release(self) -> None:
        """Let go. RingError whose `result` is "CF_ERROR_LEASE_LOST" where the frame had been taken back before."""
        self.reader.release(self)

    def __enter__(self) -> RingFrame:
        return self

    def __exit__(self, *_) -> None:
        self.release()


class Reader:
    """A session on the ring of a name; it follows the writer through restarts.

        with Reader("demo") as reader, reader.acquire(timeout=1) as frame:
            show(frame.pixels)

    lease: seconds that a frame may be held, 60 at most      Raises RingError, with the C result as `result`.
    """

    def __init__(self, name: str, *, lease: float = 1.0) -> None:
        self.name = name
        self._reader = load().RingReader(name, round(lease * 1e9))

    def acquire(
        self, policy: Policy = Policy.LATEST, *, display_time_ns: int = 0, timeout: float = 0.0
    ) -> RingFrame | None:
        """Pin a frame, or return None where there is none to give; see cf_frame_acquire. timeout: seconds to wait."""
        found = self._reader.acquire(int(policy), display_time_ns, round(timeout * 1e9))
        if found is None:
            return None
        found |= {
            "flags": Flags(found["flags"]),
            "format": Format(found["format"]),
            "memory": Memory(found["memory"]),
        }
        return RingFrame(reader=self, **found)

    def release(self, frame: RingFrame) -> None:
        self._reader.release(frame.id)

    def device_memory(self) -> DeviceHandle:
        """Ask the writer for the memory that holds the frames; see cf_session_device_memory. Once a generation."""
        found = self._reader.device_memory()
        return DeviceHandle(**found | {"memory": Memory(found["memory"])})

    def push(self, event: Event) -> int:
        """Queue an event.  -> its id. RingError with `result` "CF_ERROR_QUEUE_FULL" where there is no room."""
        if isinstance(event, PromptEvent):
            return self._reader.push_prompt(event.text)
        if isinstance(event, ActionEvent):
            return self._reader.push_action(event.code, event.value)
        if isinstance(event, PoseEvent):
            return self._reader.push_pose(event.position, event.orientation, event.time_ns)
        if type(event) not in PLAIN_KINDS:
            raise RingError(f"{type(event).__name__} is no event of a ring; push one of cfengine.embed's")
        return self._reader.push(PLAIN_KINDS[type(event)])

    def state(self) -> RingState:
        found = self._reader.state()
        rate = Fraction(found.pop("fps_numerator"), found.pop("fps_denominator"))
        named = {"state": State(found["state"]), "format": Format(found["format"]), "memory": Memory(found["memory"])}
        return RingState(**found | named | {"fps": rate})

    def stats(self) -> dict[str, int]:
        """Counts since the session was opened, named as in cf_stats."""
        return self._reader.stats()

    def close(self) -> None:
        """Release what is held. The lease ends, and memory is unmapped, when the last view of a frame is gone."""
        self._reader.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        self.close()
