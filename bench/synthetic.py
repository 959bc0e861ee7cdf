"""Random weights made on the device, seeded noise, engines of them, and the chunk scheduler without a codec."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import torch
from torch import Tensor

from cfengine.codec import Codec
from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig, preset
from cfengine.engine import Engine
from cfengine.errors import ConfigError
from cfengine.memory.memory import Memory
from cfengine.model.dit import CausalDiT
from cfengine.model.weights import expected_shapes
from cfengine.ops import Ops, select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import Schedule, chunk_noise
from cfengine.segments.torch import TorchSegments

SIZES: dict[str, EngineConfig] = {
    "full": replace(preset("context-forcing"), codec="taehv"),
    "toy": EngineConfig(
        name="bench-toy",
        model=ModelConfig(dim=128, ffn_dim=256, heads=2, layers=2, text_dim=32, text_len=16, freq_dim=32),
        memory=MemoryConfig(),
        video=VideoConfig(width=32, height=16),
        codec="taehv",
    ),
}
PROMPT_TOKENS = 100  # live tokens of 512: the released model is prompted with a paragraph


def random_weights(
    model: ModelConfig, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights that keep activations of order one: linears ~ N(0, 1 / inputs), norms near 1, small biases.

    Mean keys of two passes are then far apart, so that every promotion is decided with a wide margin in any type.
    Drawn on `device` in float32; the same seed gives other values on another kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(model).items():
        value = torch.randn(shape, generator=generator, device=device)
        if name.endswith("bias") or "modulation" in name:
            value = 0.1 * value
        elif "norm" in name:
            value = 1 + 0.1 * value
        else:
            value = value / (value[0].numel()) ** 0.5
        weights[name] = value.to(dtype)
    return weights


class RandomText:
    """A text encoder that gives every prompt the same few random tokens."""

    def __init__(self, width: int, tokens: int = 5) -> None:
        self.tokens = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))

    def encode(self, prompt: str) -> torch.Tensor:
        return self.tokens


def random_codec(config: EngineConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Codec:
    """The codec that `config.codec` names ("taehv" or "wan_vae") with random weights; ConfigError for another."""
    torch.manual_seed(0)
    if config.codec == "taehv":
        from cfengine.codec.taehv import TAEHV, TAEHVCodec

        with torch.device(device):
            model = TAEHV()
        return TAEHVCodec(model.to(dtype))
    if config.codec != "wan_vae":
        raise ConfigError(f"no random weights are made for the codec {config.codec!r}; choose taehv or wan_vae")
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise ConfigError(f"the Wan VAE needs diffusers ({error}); pip install it, or decode with taehv") from None
    from cfengine.codec.wan_vae import WanVAECodec

    with torch.device(device):
        vae = AutoencoderKLWan()
    return WanVAECodec(vae.to(dtype))


def random_engine(
    config: EngineConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    graphs: bool = True,
) -> Engine:
    """An engine of random weights; every prompt is the same PROMPT_TOKENS random tokens, or all the model takes."""
    with torch.device("meta"):
        model = CausalDiT(config.model)
    model.load_state_dict(random_weights(config.model, seed, device, dtype), assign=True)
    text = RandomText(config.model.text_dim, prompt_tokens(config))
    # on a processor codecs run in float32, as an engine loads them
    codec = random_codec(config, device, torch.float32 if torch.device(device).type == "cpu" else dtype)
    return Engine(config, model, codec, text, device=device, dtype=dtype, graphs=graphs)


def prompt_tokens(config: EngineConfig) -> int:
    """Live tokens of the random prompt; one place is left for the padding."""
    return min(PROMPT_TOKENS, config.model.text_len - 1)


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

    def __init__(
        self, weights, config: EngineConfig, prompt: Tensor, dtype=torch.float32, ops: Ops | None = None, device="cpu"
    ):
        model = CausalDiT(config.model)
        model.load_state_dict(weights)
        model.to(device, dtype).prepare(config.precision)
        self._begin(model, config, prompt, ops or chosen(config, device))

    @classmethod
    def of(cls, engine: Engine, ops: Ops | None = None) -> EngineRun:
        """A run over an engine's own model, with its operations or others."""
        run = cls.__new__(cls)
        run._begin(engine.model, engine.config, engine.text.encode("").to(engine.device), ops or engine.ops)
        return run

    def _begin(self, model: CausalDiT, config: EngineConfig, prompt: Tensor, ops: Ops) -> None:
        self.model, self.config, self.ops, self.dtype = model, config, ops, model.dtype
        self.memory = Memory(config, ops, model.dtype, model.patch_embedding.weight.device)
        self.scheduler = self._scheduler(ops)
        self.cross = model.project_text(prompt)

    def _scheduler(self, ops: Ops) -> ChunkScheduler:
        return ChunkScheduler(
            self.model, TorchSegments(self.model, ops, self.config.grid), Schedule(self.config.sampler)
        )

    def chunk(self, noise: Tensor, renoise: Tensor, start: int) -> Tensor:
        """Denoise passes, then the clean pass, as a stream runs them; returns the latents."""
        latents = self.scheduler.denoise(self.memory, self.cross, start, lambda i: noise if i == 0 else renoise[i - 1])
        self.scheduler.clean_pass(self.memory, self.cross, start, latents)
        return latents

    def attention(self, query: Tensor, layer: int = 0) -> Tensor:
        """Attention of a layer over what its table shows now.  query: (tokens, heads, head_dim)."""
        table, pool = self.memory.tables.layers[layer], self.memory.pool
        shown = table.page_ids, table.positions, table.count, table.q_positions
        options = {**pool.scales(layer), **self.memory.products}
        return self.ops.paged_attention(query, pool.k[layer], pool.v[layer], *shown, **options)

    def store(self, fused: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Norms, rotation and the write of a layer's spare pages.  fused: (tokens, 3 dim)."""
        table, pool, dim = self.memory.tables.layers[layer], self.memory.pool, self.config.model.dim
        norms = self.scheduler.segments.norms(layer)
        pages = pool.k[layer], pool.v[layer], table.spare_ids, self.config.grid
        return self.ops.qk_norm_rope_store(*fused.split(dim, dim=1), *norms, *pages, **pool.scales(layer))

    def watched(self) -> EngineRun:
        """A run over copies of the same pages whose operations show up by name in torch.profiler."""
        functions = {field.name: getattr(self.ops, field.name) for field in fields(self.ops)}
        ops = replace(self.ops, **{name: named(name, f) for name, f in functions.items() if callable(f)})
        twin = copy.copy(self)
        twin.ops, twin.scheduler = ops, self._scheduler(ops)
        twin.memory = Memory(self.config, ops, self.dtype, self.memory.device)
        twin.memory.pool, twin.memory.tables = copy.deepcopy((self.memory.pool, self.memory.tables))
        return twin


def chosen(config: EngineConfig, device: torch.device | str) -> Ops:
    """The operations that an engine of this configuration takes."""
    return select(torch.device(device).type, dict(config.kernels), fp8=config.precision.fp8)


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
