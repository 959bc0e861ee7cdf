"""Random weights, seeded noise, and the engine's own chunk scheduler without a codec: what a speed run needs."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import torch
from torch import Tensor

from cfengine.config import EngineConfig, ModelConfig
from cfengine.memory.memory import Memory
from cfengine.model.dit import CausalDiT
from cfengine.model.weights import expected_shapes
from cfengine.ops import Ops, select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import Schedule, chunk_noise
from cfengine.segments.torch import TorchSegments


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep activations of order one: linears ~ N(0, 1 / inputs), norms near 1, small biases; float32.

    Mean keys of two passes are then far apart, so that every promotion is decided with a wide margin in any type.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(model).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("bias") or "modulation" in name:
            weights[name] = 0.1 * value
        elif "norm" in name:
            weights[name] = 1 + 0.1 * value
        else:
            weights[name] = value / (value[0].numel()) ** 0.5
    return weights


def chunk_inputs(config: EngineConfig, start: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise of a chunk (frames, channels, height, width), and of its re-noisings (steps - 1, ...same)."""
    shape = config.model.in_channels, config.video.latent_height, config.video.latent_width
    frames = config.memory.chunk_frames
    steps = [chunk_noise(seed, start, frames, step, shape) for step in range(len(config.sampler.steps))]
    return steps[0], torch.stack(steps[1:]) if len(steps) > 1 else steps[0].new_zeros(0, frames, *shape)


class EngineRun:
    """The engine's model, memory and chunk scheduler on one video, codec left out.

    weights: official names, cast to `dtype`      prompt: (n, text_dim), live tokens
    """

    def __init__(self, weights, config: EngineConfig, prompt: Tensor, dtype=torch.float32, ops: Ops | None = None):
        self.config, self.dtype = config, dtype
        self.ops = ops or select("cpu", dict(config.kernels))
        self.model = CausalDiT(config.model)
        self.model.load_state_dict(weights)
        self.model.to(dtype).prepare()
        self.memory = Memory(config, self.ops, dtype)
        self.scheduler = self._scheduler(self.ops)
        self.cross = self.model.project_text(prompt)

    def _scheduler(self, ops: Ops) -> ChunkScheduler:
        return ChunkScheduler(
            self.model, TorchSegments(self.model, ops, self.config.grid), Schedule(self.config.sampler)
        )

    def chunk(self, noise: Tensor, renoise: Tensor, start: int) -> Tensor:
        """Denoise passes, then the clean pass, as a stream runs them; returns the latents."""
        latents = self.scheduler.denoise(self.memory, self.cross, start, lambda i: noise if i == 0 else renoise[i - 1])
        self.scheduler.clean_pass(self.memory, self.cross, start, latents)
        return latents

    def attention(self, query: Tensor) -> Tensor:
        """Attention of layer 0 over what its table shows now.  query: (tokens, heads, head_dim)."""
        table, pool = self.memory.tables.layers[0], self.memory.pool
        return self.ops.paged_attention(
            query, pool.k[0], pool.v[0], table.page_ids, table.positions, table.count, table.q_positions
        )

    def watched(self) -> EngineRun:
        """A run over copies of the same pages whose operations show up by name in torch.profiler."""
        functions = {field.name: getattr(self.ops, field.name) for field in fields(self.ops)}
        ops = replace(self.ops, **{name: named(name, f) for name, f in functions.items() if callable(f)})
        twin = copy.copy(self)
        twin.ops, twin.scheduler = ops, self._scheduler(ops)
        twin.memory = Memory(self.config, ops, self.dtype)
        twin.memory.pool, twin.memory.tables = copy.deepcopy((self.memory.pool, self.memory.tables))
        return twin


def named(name: str, function):
    """`function`, shown to torch.profiler as `name`."""

    def call(*arguments, **options):
        with torch.profiler.record_function(name):
            return function(*arguments, **options)

    return call


def describe(config: EngineConfig, **more) -> dict:
    """Shapes that a record carries."""
    model, memory = config.model, config.memory
    return {
        "dim": model.dim,
        "ffn_dim": model.ffn_dim,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "layers": model.layers,
        "text_len": model.text_len,
        "page_tokens": config.page_tokens,
        "chunk_frames": memory.chunk_frames,
        "slots": memory.slots,
        "threads": torch.get_num_threads(),
    } | more
