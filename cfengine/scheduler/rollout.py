"""Many sessions in lock-step with a past that is given, and no decoders: what a student makes of its own context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.memory.memory import Memory
from cfengine.model.dit import CausalDiT, CrossCache
from cfengine.ops import Ops
from cfengine.scheduler.batch import joined, per_session
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import Schedule, chunk_noise
from cfengine.segments.torch import TorchSegments


class Rollout:
    """Sessions on the engine's own passes, rules and operations; a chunk is made for all of them at once.

    Every session has its memory; `fork` leaves the present as it is and goes on from a copy.
    """

    def __init__(
        self,
        model: CausalDiT,
        config: EngineConfig,
        ops: Ops,
        encode: Callable[[Hashable], list[CrossCache]],
        seeds: Sequence[int],
    ) -> None:
        """model: prepared      encode: prompt to its keys and values, called once a prompt      seeds: one a session"""
        self.config, self.seeds = config, list(seeds)
        self._make = (model, config, ops, encode, self.seeds)
        device = model.patch_embedding.weight.device
        self.memories = [Memory(config, ops, model.dtype, device) for _ in seeds]
        ops = dataclasses.replace(ops, cross_attention=per_session(ops))
        segments = TorchSegments(model, ops, grid=config.grid)
        self.scheduler = ChunkScheduler(model, segments, Schedule(config.sampler))
        self.latents: Tensor | None = None  # of the newest chunk: (sessions, chunk_frames, channels, height, width)
        self._encode, self._prompts = encode, {}
        self._start, self._owed = 0, None

    def _joined(self, prompts: Sequence[Hashable]):
        for prompt in set(prompts) - set(self._prompts):
            self._prompts[prompt] = self._encode(prompt)
        starts, cuts = [self._start] * len(self.seeds), [False] * len(self.seeds)
        return joined(self.memories, starts, cuts, [self._prompts[prompt] for prompt in prompts])

    def prime(self, latents: Tensor, prompts: Sequence[Hashable]) -> None:
        """Take latents (sessions, frames, channels, height, width) as the past, whole chunks of it."""
        for chunk in latents.split(self.config.memory.chunk_frames, dim=1):
            self._accept(chunk, prompts)

    def step(self, prompts: Sequence[Hashable]) -> Tensor:
        """Generate the next chunk of every session: (sessions, chunk_frames, channels, height, width)."""
        self._settle()
        frames, model, video = self.config.memory.chunk_frames, self.config.model, self.config.video
        shape = (model.in_channels, video.latent_height, video.latent_width)
        memory, start, cut, cross = self._joined(prompts)

        def noise(step: int) -> Tensor:
            return torch.cat([chunk_noise(seed, self._start, frames, step, shape) for seed in self.seeds])

        x0 = self.scheduler.denoise(memory, cross, start, noise, cut=cut)
        self._accept(x0.unflatten(0, (len(self.seeds), frames)), prompts)
        return self.latents

    def _accept(self, latents: Tensor, prompts: Sequence[Hashable]) -> None:
        self._settle()
        self.latents, self._owed = latents, list(prompts)

    def _settle(self) -> None:
        """The clean pass that the newest chunk still owes."""
        if self._owed is not None:
            memory, start, cut, cross = self._joined(self._owed)
            self.scheduler.clean_pass(memory, cross, start, self.latents.flatten(0, 1), cut=cut)
            self._start, self._owed = self._start + self.config.memory.chunk_frames, None

    def fork(self) -> Rollout:
        """Another rollout that goes on from here with the same noise."""
        self._settle()
        other = Rollout(*self._make)
        for mine, copy in zip(self.memories, other.memories, strict=True):
            copy.load(mine.tensors())
        other.latents, other._start, other._prompts = self.latents, self._start, self._prompts
        return other
