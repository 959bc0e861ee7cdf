"""What comes out of a stream: frames and the timings of the chunk they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerEvents:
    """What the memory did during one chunk, summed over layers.

    `promotions`: pages that entered slow memory; `evictions`: pages dropped for good.
    """

    promotions: int = 0
    evictions: int = 0


@dataclass(frozen=True)
class Receipt:
    """When an event of `Session.push` was heard, and when it was first seen; seconds of `time.monotonic()`.

    pushed: `push` was called      applied: the chunk that shows it began
    shown: its frames were in host memory, or on the GPU where they stay there
    """

    event_id: int
    pushed: float
    applied: float
    shown: float

    @property
    def latency(self) -> float:
        """Seconds from the call to the first frames that show the event, not counting how they come to a screen."""
        return self.shown - self.pushed


@dataclass(frozen=True)
class ChunkTimings:
    """Seconds spent on one chunk, known when its frames left.

    `denoise` covers the denoise passes, `decode` the codec; `clean` is the clean pass of the *previous* chunk, since
    frames leave before their own clean pass is through. `text` is the time that the session waited for a prompt's
    encoding (first chunk of a prompt only; none where it was encoded beside the chunks).
    A CPU is timed by the clock. On a GPU its own events are read, `decode` counts the copy out of the decoder, and runs
    beside the clean pass of the same chunk, so that the parts add up to more than a chunk takes. `memory` is what
    happened since the frames before: in the clean pass of the previous chunk and the denoise passes of this one.
    `recache` is what a switch of that name cost before the chunk. `events` are those that this chunk is the first to
    show, in their order. `effort` is the level that the chunk was made at, 0 for full, `passes` the denoise passes of
    that level, and `near` whether they attended to the sink and the nearest slots alone.
    """

    chunk: int
    denoise: float
    decode: float
    clean: float = 0.0
    text: float = 0.0
    memory: LayerEvents = field(default_factory=LayerEvents)
    recache: float = 0.0
    events: tuple[Receipt, ...] = ()
    effort: int = 0
    passes: int = 0
    near: bool = False

    @property
    def total(self) -> float:
        return self.denoise + self.decode + self.clean + self.text + self.recache


@dataclass(frozen=True, eq=False)
class Frame:
    """One video frame.

    pixels: (height, width, 3) uint8 RGB, an array; of a session with frames="device" a tensor on the GPU, complete and
    not to be written; whoever reads it in another stream than the one that was current when its chunk was asked for
    keeps it until it is read (or calls its `record_stream`)      index: 0, 1, 2, ... since the start of the session
    time: presentation time in seconds (index / fps)      timings: of the chunk this frame belongs to
    last_event_id: of the newest event of `Session.push` that this frame shows, 0 where there was none
    applied_at_chunk: the first chunk that shows it (`ChunkTimings.chunk`), None where there was none
    cut: it follows nothing: the first frame after a `Reset`
    """

    pixels: np.ndarray | Tensor
    index: int
    time: float
    timings: ChunkTimings
    last_event_id: int = 0
    applied_at_chunk: int | None = None
    cut: bool = False
