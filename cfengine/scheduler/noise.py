"""Noise of a chunk before it is asked for."""

from __future__ import annotations

from torch import Tensor

from cfengine.scheduler.sampler import counter_noise


class NoiseAhead:
    """Noise of the next chunk, drawn in pinned memory while the GPU works on this one.

    Two buffers in turn: the copy out of one may still be queued while the other is filled.
    """

    def __init__(self, buffers: list[Tensor], frames: int) -> None:
        """buffers: two of (steps, sessions * frames, channels, height, width) float32."""
        self._buffers, self._frames, self._turn = buffers, frames, 0
        self._drawn: list[tuple[int, int]] | None = None

    def take(self, wanted: list[tuple[int, int]]) -> Tensor:
        """Noise for one (seed, first latent frame) a session: (steps, len(wanted) * frames, ...)."""
        if self._drawn != wanted:
            self.draw(wanted)
        return self._buffers[self._turn][:, : len(wanted) * self._frames]

    def draw(self, wanted: list[tuple[int, int]]) -> None:
        self._turn, self._drawn = 1 - self._turn, None  # until all of it is there
        for step, noise in enumerate(self._buffers[self._turn]):
            for place, out in enumerate(noise[: len(wanted) * self._frames]):
                seed, first = wanted[place // self._frames]
                counter_noise(seed, first + place % self._frames, step, tuple(out.shape), out)
        self._drawn = wanted
