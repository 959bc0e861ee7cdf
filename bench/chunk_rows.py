"""Operations over the tokens and latents of a chunk: norms, products, the prompt, the sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cfengine.bench.rows import Library, Maker, Row
from cfengine.bench.synthetic import prompt_tokens
from cfengine.bench.work import products
from cfengine.ops import reference


def norm(maker: Maker) -> Row:
    """Modulated norm of a chunk."""
    dim, eps = maker.config.model.dim, maker.config.model.eps

    def operands(seed: int) -> tuple:
        x = (maker.normal(maker.tokens, dim, seed=seed) * 3 + 5).to(maker.dtype)
        return x, *(maker.normal(1, dim, seed=seed + i, dtype=torch.float32) for i in (1, 2))

    def library(given: tuple) -> Callable[[], Tensor]:
        x, shift, scale = (t.to(maker.dtype) for t in given)
        return lambda: F.layer_norm(x, (dim,), eps=eps) * (1 + scale) + shift

    out = 1 if maker.fp8 else maker.element
    return Row(
        "modulated_norm",
        "",
        f"{maker.tokens} x {dim}",
        maker.kind,
        operands,
        traffic=maker.tokens * dim * (maker.element + out),
        options={"eps": eps, **maker.fp8},
        library=Library("F.layer_norm, one product and one sum", library),
    )


def gated(maker: Maker) -> Row:
    """Gated residual of a chunk with the norm that follows."""
    dim, eps = maker.config.model.dim, maker.config.model.eps

    def operands(seed: int) -> tuple:
        x, y = (maker.normal(maker.tokens, dim, seed=seed + i) for i in range(2))
        return x, y, *(maker.normal(1, dim, seed=seed + i, dtype=torch.float32) for i in (2, 3, 4))

    def library(given: tuple) -> Callable[[], Tensor]:
        x, y, gate, shift, scale = (t.to(maker.dtype) for t in given)
        return lambda: F.layer_norm(x + y * gate, (dim,), eps=eps) * (1 + scale) + shift

    out = 1 if maker.fp8 else maker.element
    return Row(
        "gated_residual",
        "",
        f"{maker.tokens} x {dim}",
        maker.kind,
        operands,
        traffic=maker.tokens * dim * (3 * maker.element + out),
        options={"eps": eps, **maker.fp8},
        library=Library("x + y * gate, F.layer_norm, one product and one sum", library),
    )


def cross(maker: Maker) -> Row:
    """Chunk against the live tokens of a prompt and its collapsed padding."""
    model, keys = maker.config.model, prompt_tokens(maker.config) + 1
    width = model.heads * model.head_dim

    def operands(seed: int) -> tuple:
        q = maker.normal(maker.tokens, model.heads, model.head_dim, seed=seed)
        k, v = (maker.normal(keys, model.heads, model.head_dim, seed=seed + i) for i in (1, 2))
        bias = torch.zeros(keys, device=maker.device)
        bias[-1] = 6.0
        return q, k, v, bias

    def library(given: tuple) -> Callable[[], Tensor]:
        q, k, v = (t.transpose(0, 1)[None] for t in given[:3])
        return lambda: F.scaled_dot_product_attention(q, k, v)

    return Row(
        "cross_attention",
        "",
        f"{maker.tokens} queries, {keys} keys, {model.heads} heads of {model.head_dim}",
        maker.kind,
        operands,
        traffic=2.0 * (maker.tokens + keys) * width * maker.element,
        flops=4.0 * maker.tokens * keys * width,
        library=Library("torch SDPA without the bias", library),
    )


def quantised(maker: Maker) -> Iterator[Row]:
    """Activations to e4m3, one scale a row: attention's output, and the hidden layer with its GELU."""
    for width, gelu in ((maker.config.model.dim, False), (maker.config.model.ffn_dim, True)):
        yield Row(
            "quantise_rows",
            f"{width}",
            f"{maker.tokens} x {width}{' with GELU' if gelu else ''}",
            maker.kind,
            lambda seed, width=width: (maker.normal(maker.tokens, width, seed=seed),),
            traffic=maker.tokens * width * (maker.element + 1.0),
            options={"gelu": gelu},
        )


def linears(maker: Maker) -> Iterator[Row]:
    """Products of a block on e4m3 operands, against the library's bfloat16 product."""
    quantise = reference("quantise_rows")
    for name, (width, out) in products(maker.config).items():

        def operands(seed: int, width=width, out=out) -> tuple:
            weight = maker.normal(out, width, seed=seed + 1) / width**0.5
            bias = maker.normal(out, seed=seed + 2)
            return *quantise(maker.normal(maker.tokens, width, seed=seed)), *quantise(weight), bias

        def library(given: tuple) -> Callable[[], Tensor]:
            x, weight, bias = given[0].to(maker.dtype), given[2].to(maker.dtype), given[4]
            return lambda: F.linear(x, weight, bias)

        yield Row(
            "linear_fp8",
            name,
            f"{name}: {maker.tokens} x {width} by {out}",
            maker.kind,
            operands,
            traffic=float(maker.tokens * width + width * out + maker.element * maker.tokens * out),
            flops=2.0 * maker.tokens * width * out,
            library=Library("F.linear in bfloat16", library),
        )


def sampler(maker: Maker) -> Iterator[Row]:
    """The arithmetic between passes, over the latents of a chunk."""
    config = maker.config
    shape = (
        config.memory.chunk_frames,
        config.model.in_channels,
        config.video.latent_height,
        config.video.latent_width,
    )
    size = torch.Size(shape).numel()
    flow = maker.element
    for op, second, traffic in (("flow_to_x0", maker.dtype, 8 + flow), ("renoise", torch.float32, 12)):

        def operands(seed: int, second=second) -> tuple:
            first = maker.normal(*shape, seed=seed, dtype=torch.float32)
            return first, maker.normal(*shape, seed=seed + 1, dtype=second), 0.7

        yield Row(op, "", "x".join(map(str, shape)), maker.kind, operands, traffic=float(size * traffic))
