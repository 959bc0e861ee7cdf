"""Work between buffers that never move: what a CUDA graph captures, and what runs as well without one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from cfengine.codec import StreamDecoder
from cfengine.config import EngineConfig
from cfengine.errors import ConfigError
from cfengine.memory.memory import Memory
from cfengine.model.dit import CrossCache
from cfengine.scheduler.batch import joined
from cfengine.scheduler.chunk import ChunkScheduler


class PromptBuffers:
    """Cross-attention keys and values of one session, padded to the longest prompt by keys of bias -inf.

    A prompt is copied into them, so what reads them needs no word of a change.
    """

    def __init__(self, config: EngineConfig, dtype: torch.dtype, device: torch.device) -> None:
        model = config.model
        self.bias = torch.full((model.text_len,), float("-inf"), device=device)
        self.bias[0] = 0.0  # before the first prompt one key of zeros, so that a pass has something to attend to
        shape = (model.text_len, model.heads, model.head_dim)
        self.layers = [
            CrossCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"), self.bias)
            for _ in range(model.layers)
        ]
        self._held: list[CrossCache] | None = None

    def load(self, caches: list[CrossCache]) -> None:
        """Take over a prompt's keys and values, per layer, unless they are here already."""
        if caches is self._held:
            return
        keys = caches[0].bias.shape[0]
        self.bias[:keys].copy_(caches[0].bias, non_blocking=True)
        self.bias[keys:].fill_(float("-inf"))
        for place, cache in zip(self.layers, caches, strict=True):
            place.k[:keys].copy_(cache.k, non_blocking=True)
            place.v[:keys].copy_(cache.v, non_blocking=True)
        self._held = caches

    def forget(self) -> None:
        """Let go of the prompt that was taken over; a pass needs another one first."""
        self._held = None


class ChunkProgram:
    """The passes of a chunk, of one session or of several in lock-step.

    noise: (steps, sessions * frames, channels, height, width) and x0: (sessions * frames, ...), float32
    finite: (sessions,) bool, whether all of a session's x0 is
    starts, cuts: (sessions, 1) int32      prompts: one a session      all are filled before `denoise`
    """

    def __init__(self, scheduler: ChunkScheduler, config: EngineConfig, memories: list[Memory]) -> None:
        video, count, device = config.video, len(memories), memories[0].device
        shape = (
            count * config.memory.chunk_frames,
            config.model.in_channels,
            video.latent_height,
            video.latent_width,
        )
        self.noise = torch.zeros(len(config.sampler.steps), *shape, device=device)
        self.x0 = torch.zeros(shape, device=device)
        self.finite = torch.ones(count, dtype=torch.bool, device=device)
        self.starts, self.cuts = (torch.zeros(count, 1, dtype=torch.int32, device=device) for _ in range(2))
        self.prompts = [PromptBuffers(config, scheduler.model.dtype, device) for _ in memories]
        self._scheduler, self._memories = scheduler, memories
        self._join(count)

    def _join(self, count: int) -> None:
        prompts = [prompt.layers for prompt in self.prompts[:count]]
        self._inputs = joined(self._memories[:count], [*self.starts[:count]], [*self.cuts[:count]], prompts)

    def part(self, count: int) -> ChunkProgram:
        """The same passes for the sessions in the first `count` places alone, in the same buffers."""
        rows = self.x0.shape[0] // len(self._memories) * count
        part = copy.copy(self)
        part.noise, part.x0, part.finite = self.noise[:, :rows], self.x0[:rows], self.finite[:count]
        part._join(count)
        return part

    def set(self, place: int, start: int, cut: bool, cross: list[CrossCache]) -> None:
        """Say what a session's next chunk is."""
        self.starts[place].fill_(start)
        self.cuts[place].fill_(int(cut))
        self.prompts[place].load(cross)

    def denoise(self, effort: int = 0) -> None:
        """noise -> x0, and the tables and pages of every memory.  effort: see `Schedule.efforts`"""
        memory, start, cut, cross = self._inputs
        self.x0.copy_(self._scheduler.denoise(memory, cross, start, self.noise.__getitem__, cut=cut, effort=effort))
        self.finite.copy_(torch.isfinite(self.x0).view(len(self.finite), -1).all(1))

    def clean(self) -> None:
        """x0 -> pages that stay."""
        memory, start, cut, cross = self._inputs
        self._scheduler.clean_pass(memory, cross, start, self.x0, cut=cut)


class DecodeProgram:
    """A decoder whose past is kept in place: latents -> frames."""

    def __init__(self, decoder: StreamDecoder, latents: Tensor) -> None:
        """latents: (chunk_frames, channels, height, width), filled before each call."""
        self.latents, self._decoder = latents, decoder
        self.past: dict[int, Tensor] = {}  # by place in the network

    def load(self, past: dict[int, Tensor]) -> None:
        """Take over the past of a decoder of the same shapes, in place; nothing where it has none."""
        for place, tensor in past.items():
            self.past[place].copy_(tensor)

    def first(self) -> Tensor:
        """Draw the first chunk of a stream: (frames, H, W, 3) uint8."""
        return self._draw({})

    def later(self) -> Tensor:
        """Draw a chunk that follows another."""
        return self._draw(dict(self.past))

    def _draw(self, past: dict[int, Any]) -> Tensor:
        self._decoder.state = past
        frames, left = self._decoder.draw(self.latents), self._decoder.state
        if not self.past:
            self.past = {place: tensor.clone() for place, tensor in left.items() if torch.is_tensor(tensor)}
        shapes = {place: getattr(tensor, "shape", None) for place, tensor in left.items()}
        if shapes != {place: tensor.shape for place, tensor in self.past.items()}:
            raise ConfigError(
                f"the decoder keeps {len(left)} parts of the past after a chunk of {len(self.latents)} latent frames, "
                "not of the shapes that it kept before; decode chunks of at least 2 latent frames"
            )
        for place, tensor in self.past.items():
            tensor.copy_(left[place])
        return frames
