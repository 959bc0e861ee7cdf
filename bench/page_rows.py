"""Operations over pages: attention, the page writer, and the rule of a layer's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cfengine.bench.rows import Library, Maker, Row, values
from cfengine.kernels.paged_attention.reference import paged_attention as attention_reference
from cfengine.kernels.paged_attention.reference import shown
from cfengine.kernels.rope import axis_pairs, spatial_table
from cfengine.kernels.slow_fast_update.cases import empty_table, rule
from cfengine.ops import reference

SAMPLED = 48  # queries that are checked in float64


def attention(maker: Maker, slots: int) -> Row:
    """Queries of a chunk against `slots` pages. Traffic: queries, pages and output once."""
    model, frames, page = maker.config.model, maker.config.memory.chunk_frames, maker.config.page_tokens
    pool = maker.pool(0)
    order = torch.randperm(pool.k.shape[1] - 1, generator=torch.Generator().manual_seed(1))[:slots] + 1
    few = torch.arange(0, maker.tokens, max(1, maker.tokens // SAMPLED), device=maker.device)[:SAMPLED]
    scales = pool.scales(0)

    def operands(seed: int) -> tuple:
        return (
            maker.normal(maker.tokens, model.heads, model.head_dim, seed=seed),
            pool.k[0],
            pool.v[0],
            order.int().to(maker.device),
            maker.integers(*range(slots)),
            maker.integers(slots),
            maker.integers(*range(slots - frames, slots)),
        )

    def expect(given: tuple) -> list[Tensor]:
        q, *rest, q_positions = given
        wide = [t.double() if t.dtype == maker.dtype else t for t in rest]
        return [attention_reference(q[few].double(), *wide, q_positions[few // page], **scales)]

    def library(given: tuple) -> Callable[[], Tensor]:
        q, k, v, ids = given[:4]
        seen = [
            shown(pages, scales.get(name), ids.long(), maker.dtype).flatten(0, 1)
            for pages, name in ((k, "k_scale"), (v, "v_scale"))
        ]
        q, k, v = (t.transpose(0, 1)[None].contiguous() for t in (q, *seen))
        return lambda: F.scaled_dot_product_attention(q, k, v)

    keys, width = slots * page, model.heads * model.head_dim
    return Row(
        "paged_attention",
        f"{slots}_slots",
        f"{maker.tokens} queries, {keys} keys, {model.heads} heads of {model.head_dim}",
        maker.kind,
        operands,
        traffic=2.0 * maker.tokens * width * maker.element + 2.0 * keys * width * pool.k.element_size(),
        flops=4.0 * maker.tokens * keys * width,
        options=scales,
        library=Library("torch SDPA on gathered pages, gathering not counted", library),
        look=lambda result, given: [result[few]],
        expect=expect,
    )


def store(maker: Maker) -> Row:
    """Norms, spatial rotation and the write of a chunk's pages."""
    model, frames, eps = maker.config.model, maker.config.memory.chunk_frames, maker.config.model.eps
    pool, grid, dim = maker.pool(0), maker.config.grid, maker.config.model.dim
    norms = [(1 + 0.1 * maker.normal(dim, seed=8 + i)).to(maker.dtype) for i in range(2)]
    ids = maker.integers(*range(1, frames + 1))
    scales = pool.scales(0)

    def operands(seed: int) -> tuple:
        fused = maker.normal(maker.tokens, 3 * dim, seed=seed)
        return *fused.split(dim, dim=1), *norms, pool.k[0], pool.v[0], ids, grid

    def look(result, given: tuple) -> list[Tensor]:
        pages = [
            shown(part, scales.get(name), ids.long(), torch.float64)
            for part, name in ((given[5], "k_scale"), (given[6], "v_scale"))
        ]
        return [*values(result), *pages]

    def library(given: tuple) -> Callable[[], Any]:
        q, k, v, norm_q, norm_k, k_pages, v_pages = given[:7]
        first = axis_pairs(model.head_dim)[0]
        turn = torch.view_as_complex(spatial_table(*grid, model.head_dim).contiguous()).to(maker.device)
        places = ids.long()

        def rotated(x: Tensor, weight: Tensor) -> Tensor:
            x = F.rms_norm(x, (dim,), weight, eps).view(frames, -1, model.heads, model.head_dim)
            pairs = torch.view_as_complex(x[..., 2 * first :].float().unflatten(-1, (-1, 2)).contiguous())
            turned = torch.view_as_real(pairs * turn[:, None]).flatten(-2).to(x.dtype)
            return torch.cat([x[..., : 2 * first], turned], dim=-1)

        def call() -> Tensor:
            query, keys = rotated(q, norm_q), rotated(k, norm_k)
            k_pages[places] = keys
            v_pages[places] = v.reshape(keys.shape)
            return query

        return call

    written = 2.0 * maker.tokens * dim * pool.k.element_size()
    return Row(
        "qk_norm_rope_store",
        "",
        f"{maker.tokens} x {dim}, {frames} pages",
        maker.kind,
        operands,
        traffic=4.0 * maker.tokens * dim * maker.element + written,
        options={"eps": eps, **scales},
        library=None if scales else Library("F.rms_norm, complex rotation, two index writes", library),
        look=look,
    )


def update(maker: Maker) -> Row:
    """The Slow-Fast rule of one layer, in a memory that has filled."""
    memory, dim = maker.config.memory, maker.config.model.dim
    sizes = rule(memory.sink, memory.slow, memory.fast, memory.chunk_frames, memory.keep, memory.rope_length)
    reference_update = reference("slow_fast_update")

    def operands(seed: int) -> tuple:
        table = empty_table(sizes, dim)
        chunks = memory.slots // memory.chunk_frames + 1
        keys = torch.randn(chunks, dim, generator=torch.Generator().manual_seed(seed))
        for chunk, key in enumerate(keys):
            reference_update(table, key, chunk * memory.chunk_frames, sizes)
        table = type(table)(*(t.to(maker.device) for t in table))
        return table, keys[0].to(maker.device), chunks * memory.chunk_frames, sizes

    return Row(
        "slow_fast_update",
        "",
        f"{memory.slots} slots, width {dim}",
        maker.kind,
        operands,
        traffic=12.0 * dim,  # two keys read, one written
        look=lambda result, given: [t.nan_to_num(7.0) for t in given[0]],
    )
