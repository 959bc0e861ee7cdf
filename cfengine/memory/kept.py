"""Latents of the chunks that a memory shows, so that its pages can be computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.memory.memory import Shown


class KeptLatents:
    """Places for as many chunks as a layer has slots, allocated once, on the device.

    That is enough for what one layer can show of chunks, whole or in part. Layers that decide for themselves may show
    more between them; the chunks that the fewest layers show are then the first to go, the oldest of these first.
    """

    def __init__(self, config: EngineConfig, device: torch.device | str = "cpu") -> None:
        memory, video = config.memory, config.video
        shape = (config.model.in_channels, video.latent_height, video.latent_width)
        self.latents = torch.zeros(memory.slots, memory.chunk_frames, *shape, device=device)
        self.starts = [-1] * memory.slots  # first frame of the chunk in each place

    def put(self, start: int, latents: Tensor, shown: Shown) -> None:
        """Keep a chunk, by its first frame; shown: what the memory showed before it came."""
        layers = shown.chunks(self.latents.shape[1])

        def worth(place: int) -> tuple[int, int]:
            return layers.get(self.starts[place], 0), self.starts[place]

        place = self.starts.index(start) if start in self.starts else min(range(len(self.starts)), key=worth)
        self.latents[place].copy_(latents)
        self.starts[place] = start

    def of(self, start: int) -> Tensor:
        """Latents of a chunk that is kept: (chunk_frames, channels, height, width)."""
        return self.latents[self.starts.index(start)]

    def reset(self) -> None:
        """Forget everything; a snapshot has all places, so none may still show what another session saw."""
        self.starts = [-1] * len(self.starts)
        self.latents.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        return {"latents": self.latents, "starts": torch.tensor(self.starts)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over `tensors` of one of the same configuration, in place."""
        self.latents.copy_(tensors["latents"])
        self.starts = tensors["starts"].tolist()
