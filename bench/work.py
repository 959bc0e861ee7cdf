"""Arithmetic and traffic of a chunk, counted from the configuration alone: what no implementation can do without.

A floating-point operation is a multiplication or an addition. Traffic counts every input of an operation of the table
in ARCHITECTURE.md once and every output once, at the size of its type; products fuse their bias, and GELU with them.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch

from cfengine.codec.taehv import build_decoder
from cfengine.config import EngineConfig

BF16, FP8, FP32 = 2, 1, 4  # bytes


@dataclass(frozen=True)
class Work:
    """Operations of products and of the two attentions; bytes of weights, pages and element-wise operations."""

    linear: float = 0.0
    attention: float = 0.0
    cross: float = 0.0
    weights: float = 0.0
    pages: float = 0.0
    elements: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * a for a in astuple(self)))

    @property
    def flops(self) -> float:
        return self.linear + self.attention + self.cross


@dataclass(frozen=True)
class Sizes:
    """What a chunk is made of.

    keys: tokens attended, the chunk itself included      text: keys of the prompt, the collapsed padding among them
    element, weight, page: bytes of an activation, a weight and a page's entry
    quantised: bytes of an activation that a product reads
    """

    tokens: int
    keys: int
    text: int
    element: int = BF16
    weight: int = BF16
    page: int = BF16
    quantised: int = BF16


def sizes(config: EngineConfig, slots: int | None = None, text: int | None = None, precision: str = "bf16") -> Sizes:
    """Sizes of a chunk with `slots` pages in context (default: a full memory) and `text` keys (default: text_len)."""
    slots = config.memory.slots if slots is None else slots
    text = config.model.text_len if text is None else text
    tokens, keys = config.memory.chunk_frames * config.page_tokens, slots * config.page_tokens
    if precision == "fp32":
        return Sizes(tokens, keys, text, FP32, FP32, FP32, FP32)
    small = FP8 if precision == "fp8" else BF16
    return Sizes(tokens, keys, text, BF16, small, small, small)


def products(config: EngineConfig, *, keys_only: bool = False) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of every product of a block, or (keys_only) of the last block of a clean pass."""
    dim, ffn = config.model.dim, config.model.ffn_dim
    if keys_only:
        return {"kv": (dim, 2 * dim)}
    return {
        "qkv": (dim, 3 * dim),
        "o": (dim, dim),
        "cross_q": (dim, dim),
        "cross_o": (dim, dim),
        "ffn_up": (dim, ffn),
        "ffn_down": (ffn, dim),
    }


def block_work(config: EngineConfig, size: Sizes, *, keys_only: bool = False) -> Work:
    """One block over a chunk.

    The element-wise operations of a block: `qk_norm_rope_store` reads q, k, v and writes q and two pages; three
    `gated_residual` read x and y and write x and its norm; the norm of the cross-attention's query reads and writes.
    """
    dim = config.model.dim
    row = size.tokens * dim  # entries of one activation
    weights = sum(math.prod(shape) for shape in products(config, keys_only=keys_only).values())
    linear = 2.0 * size.tokens * weights
    if keys_only:
        return Work(linear=linear, weights=weights * size.weight, elements=row * (2 * size.element + 2 * size.page))
    store = row * (4 * size.element + 2 * size.page)
    gates = 3 * row * (3 * size.element + size.quantised)
    query = row * 2 * size.element
    return Work(
        linear=linear,
        attention=4.0 * size.tokens * size.keys * dim,
        cross=4.0 * size.tokens * size.text * dim,
        weights=weights * size.weight,
        pages=2.0 * size.keys * dim * size.page,
        elements=store + gates + query,
    )


def pass_work(config: EngineConfig, size: Sizes, *, clean: bool = False) -> Work:
    """One pass of the transformer. A clean pass stops at the last block's keys and values, and has no head."""
    model, patch = config.model, math.prod(config.model.patch)
    ends = patch * model.in_channels * model.dim
    head = 0 if clean else patch * model.out_channels * model.dim
    first_norm = size.tokens * model.dim * (size.element + size.quantised)
    total = Work(linear=2.0 * size.tokens * (ends + head), weights=BF16 * (ends + head), elements=float(first_norm))
    total += block_work(config, size) * (model.layers - 1)
    return total + block_work(config, size, keys_only=clean)


def chunk_work(config: EngineConfig, size: Sizes) -> Work:
    """The denoise passes of a chunk and its clean pass."""
    return pass_work(config, size) * len(config.sampler.steps) + pass_work(config, size, clean=True)


def taehv_work(config: EngineConfig) -> tuple[float, float]:
    """(operations, bytes of activations in bfloat16) of TAEHV over a chunk, counted on its own modules.

    Convolutions alone: the rest could be fused with them.
    """
    flops = traffic = 0.0

    def count(module: torch.nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal flops, traffic
        flops += 2.0 * output.numel() * module.weight[0].numel()
        traffic += BF16 * (inputs[0].numel() + output.numel())

    with torch.device("meta"), torch.no_grad():
        decoder = build_decoder()
        for module in decoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(count)
        video = config.video
        latents = torch.empty(
            config.memory.chunk_frames, config.model.out_channels, video.latent_height, video.latent_width
        )
        decoder.run(latents, {})
    return flops, traffic
