"""What comes out of a stream: frames and the timings of the chunk they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class LayerEvents:
    """What the memory did during one chunk, summed over layers.

    `promotions`: pages that entered slow memory; `evictions`: pages dropped for good.
    """

    promotions: int = 0
    evictions: int = 0


@dataclass(frozen=True)
class ChunkTimings:
    """Seconds spent on one chunk, known when its frames left.

    `denoise` covers the denoise passes, `decode` the codec; `clean` is the clean pass of the *previous* chunk, since
    frames leave before their own clean pass is through. `text` is the prompt encoding (first chunk of a prompt only).
    A CPU is timed by the clock. On a GPU its own events are read, `decode` counts the copy to host memory, and runs
    beside the clean pass of the same chunk, so that the parts add up to more than a chunk takes. `memory` is what
    happened since the frames before: in the clean pass of the previous chunk and the denoise passes of this one.
    """

    chunk: int
    denoise: float
    decode: float
    clean: float = 0.0
    text: float = 0.0
    memory: LayerEvents = field(default_factory=LayerEvents)

    @property
    def total(self) -> float:
        return self.denoise + self.decode + self.clean + self.text


@dataclass(frozen=True, eq=False)
class Frame:
    """One video frame.

    pixels: (height, width, 3) uint8 RGB      index: 0, 1, 2, ... since the start of the session
    time: presentation time in seconds (index / fps)      timings: of the chunk this frame belongs to
    """

    pixels: np.ndarray
    index: int
    time: float
    timings: ChunkTimings
