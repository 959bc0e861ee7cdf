"""Operations over pages: attention, the page writer, and the rules of a layer's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cfengine.bench.rows import Library, Maker, Row, values
from cfengine.kernels.paged_attention.reference import paged_attention as attention_reference
from cfengine.kernels.paged_attention.reference import shown
from cfengine.kernels.rope import axis_pairs, spatial_table
from cfengine.kernels.slow_fast_paper_update.cases import rule as paper_rule
from cfengine.kernels.slow_fast_update.cases import empty_table, rule
from cfengine.kernels.window_update.reference import WindowRule
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


def updates(maker: Maker) -> Iterator[Row]:
    """The rule of one layer in a memory that has filled: a row for each operation that is such a rule."""
    memory, frames = maker.config.memory, maker.config.memory.chunk_frames
    sizes = (memory.sink, memory.slow, memory.fast, frames)
    slow_fast = rule(*sizes, memory.keep, memory.rope_length)
    paper = paper_rule(*sizes, memory.rope_length)
    window = WindowRule(memory.sink, memory.slots, frames, relative=True, whole_sink=False, scenes=False)
    dim = 12.0 * maker.config.model.dim  # bytes: two keys read, one written
    yield _update(
        maker, "slow_fast_update", lambda table, beside, key, start: (table, key, start, slow_fast), traffic=dim
    )
    yield _update(
        maker,
        "slow_fast_paper_update",
        lambda table, beside, key, start: (table, beside, key, start, paper),
        beside=memory.slots,
        traffic=dim,
        clean=True,
    )
    described = (memory.slots + frames + 1, maker.config.model.dim)
    yield _update(
        maker,
        "slow_fast_diverse_update",
        lambda table, beside, key, start: (table, beside, key.new_zeros(described), key, start, paper),
        beside=memory.slots,
        traffic=dim * (1 + (memory.slow + 1 + frames) / 3),  # descriptors compared and written
        clean=True,
    )
    yield _update(
        maker,
        "window_update",
        lambda table, beside, key, start: (table, beside, start, window),
        beside=1,
        traffic=8.0 * 3 * memory.slots,  # ids, sources and positions read and written
    )


def _update(
    maker: Maker, op: str, arguments: Callable[..., tuple], *, traffic: float, beside: int = 0, **options: bool
) -> Row:
    """Row of a rule. arguments(table, beside, key, start) -> operands; beside: integers that go with the table.

    options: keyword arguments of the operation
    """
    memory, dim = maker.config.memory, maker.config.model.dim
    table = empty_table(rule(memory.sink, memory.slow, memory.fast, memory.chunk_frames), dim)
    numbers = torch.zeros(beside, dtype=torch.int32)
    chunks = 2 * memory.slots  # the paper's rule promotes one page in two chunks at most
    for chunk, key in enumerate(torch.randn(chunks, dim, generator=torch.Generator().manual_seed(0))):
        reference(op)(*arguments(table, numbers, key, chunk * memory.chunk_frames), **options)

    def operands(seed: int) -> tuple:
        own = type(table)(*(t.to(maker.device, copy=True) for t in table))
        start = maker.integers(chunks * memory.chunk_frames)  # read on the device: a graph captures the call
        key = maker.normal(dim, seed=seed, dtype=torch.float32)
        return arguments(own, numbers.to(maker.device, copy=True), key, start)

    return Row(
        op,
        "",
        f"{memory.slots} slots, width {dim}",
        maker.kind,
        operands,
        traffic=traffic,
        options=options,
        look=lambda result, given: [t.nan_to_num(7.0) for t in (*given[0], *(given[1:2] if beside else ()))],
    )
