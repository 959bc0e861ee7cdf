"""The batched, differentiable forward: every chunk of many sessions at once, each under its own memory.

Teacher forcing in streams. Stream 0 is clean (timestep 0): its keys and values become pages, as in the engine's clean
pass. The other streams hold noisy copies of the same chunks; a noisy chunk attends to the pages of the chunks before
it that its memory holds (`cfengine.training.slots`), and to itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cfengine.config import MemoryConfig, ModelConfig
from cfengine.kernels.rope import axis_frequencies, axis_pairs
from cfengine.model.dit import Block, CausalDiT, RMSNorm
from cfengine.training.slots import page_table, positions


class Places(NamedTuple):
    """Rotations of a sequence of chunks, as pairs (cosine, signed sine) over all channels of a head.

    query: (chunks, tokens, 1, head_dim) full      page: (tokens, 1, head_dim) rows and columns
    own: (chunks, tokens, 1, head_dim) time      context: (chunks, slots, 1, 1, head_dim) time
    """

    query: tuple[Tensor, Tensor]
    page: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]
    context: tuple[Tensor, Tensor]


class Pages(NamedTuple):
    """What the chunks of a layer see: keys (turned to their places), values (B C, heads, L, head_dim), hidden slots.

    ids: (B, C, slots) as in `page_table`
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor
    ids: Tensor


Watch = Callable[[Tensor, Pages], None]  # sees attention (B C, heads, streams, T, L) on the page tokens of a block


class Context(NamedTuple):
    """Pages of every layer, the prompt (B, C, n, dim) with the weights of its rows, and the rotations."""

    layers: list[Pages]
    prompt: Tensor
    bias: Tensor
    where: Places


def window(context: Context, first: int, count: int) -> Context:
    """What `count` chunks from `first` on see of a context."""
    B, C = context.prompt.shape[:2]
    chunks = slice(first, first + count)

    def cut(part: Tensor) -> Tensor:
        return part.unflatten(0, (B, C))[:, chunks].flatten(0, 1)

    layers = [Pages(cut(p.keys), cut(p.values), cut(p.hidden), p.ids[:, chunks]) for p in context.layers]
    where = context.where
    query, own, slots = ((cosine[chunks], sine[chunks]) for cosine, sine in (where.query, where.own, where.context))
    return Context(layers, context.prompt[:, chunks], context.bias, Places(query, where.page, own, slots))


def rotation(angle: Tensor, first: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Angles (..., n) of pairs first .. first + n of `pairs` -> cosine and signed sine (..., 2 pairs) float32."""
    full = F.pad(angle, (first, pairs - first - angle.shape[-1]))
    sine = full.sin()
    return full.cos().repeat_interleave(2, dim=-1).float(), torch.stack([-sine, sine], dim=-1).flatten(-2).float()


def turn(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate interleaved pairs of x (..., head_dim): (a, b) -> (a cos - b sin, b cos + a sin)."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * by[0].to(x.dtype) + swapped * by[1].to(x.dtype)


@lru_cache(maxsize=16)
def places(
    chunks: int, grid: tuple[int, int], head_dim: int, theta: float, memory: MemoryConfig, device: torch.device
) -> Places:
    """Tables for sequences of `chunks` chunks."""
    c, pairs = memory.chunk_frames, head_dim // 2
    time_pairs, row_pairs, column_pairs = axis_pairs(head_dim)
    rate = axis_frequencies(time_pairs, theta)
    own, slots = positions(chunks, memory)
    row = torch.arange(grid[0]).double()[:, None, None] * axis_frequencies(row_pairs, theta)
    column = torch.arange(grid[1]).double()[None, :, None] * axis_frequencies(column_pairs, theta)
    spatial = torch.cat([row.expand(-1, grid[1], -1), column.expand(grid[0], -1, -1)], dim=-1).flatten(0, 1)
    spatial = spatial.repeat(c, 1)[:, None]  # (tokens, 1, spatial pairs)
    own_angle = (own.double()[..., None] * rate).repeat_interleave(grid[0] * grid[1], dim=1)[:, :, None]
    slot_angle = (slots.double()[..., None] * rate)[:, :, None, None]
    both = torch.cat([own_angle, spatial.expand(chunks, -1, -1, -1)], dim=-1)
    angles = (both, 0), (spatial, time_pairs), (own_angle, 0), (slot_angle, 0)
    turned = (rotation(angle, first, pairs) for angle, first in angles)
    return Places(*((cosine.to(device), sine.to(device)) for cosine, sine in turned))


def _recall(keys: Tensor, values: Tensor, mean: Tensor, where: Places, memory: MemoryConfig) -> Pages:
    """Gather for every chunk the clean pages it sees; keys, values (B, C, T, heads, head_dim), mean (B, C, dim)."""
    B, C, T, heads, head_dim = keys.shape
    c = memory.chunk_frames
    pages, valid = page_table(mean, memory)
    seen = [
        pool.reshape(B * C * c, T // c, heads, head_dim)[pages.flatten()].unflatten(0, (B, C, -1))
        for pool in (keys, values)
    ]
    seen[0] = turn(seen[0], where.context)
    hidden = ~valid.flatten(0, 1).repeat_interleave(T // c, dim=-1)[:, None, None]
    return Pages(*(part.flatten(2, 3).flatten(0, 1).transpose(1, 2) for part in seen), hidden, pages)


def _no_pages(sessions: int, config: ModelConfig, device: torch.device) -> Pages:
    """What first chunks see."""
    keys = torch.zeros(sessions, config.heads, 0, config.head_dim, device=device)
    return Pages(keys, keys, keys.new_zeros(sessions, 1, 1, 0, dtype=torch.bool), keys.new_zeros(sessions, 1, 0).long())


def _project(block: Block, normed: Tensor, where: Places) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with rows and columns rotated, values (streams, B, C, T, heads, head_dim), and raw keys (..., dim)."""
    attention = block.self_attn
    raw = _rms(attention.norm_k, attention.k(normed))
    keys = turn(attention.split(raw), where.page)
    return keys, attention.split(attention.v(normed)), raw


def _attend(
    block: Block, normed: Tensor, keys: Tensor, values: Tensor, pages: Pages, where: Places, watch: Watch | None = None
) -> Tensor:
    """Self-attention of streams over pages and over each chunk's own tokens; normed (streams, B, C, T, dim)."""
    attention = block.self_attn
    streams, B, C, T, dim = normed.shape
    query = turn(attention.split(_rms(attention.norm_q, attention.q(normed))), where.query)
    own_k, own_v, own_q = (
        part.permute(1, 2, 4, 0, 3, 5).flatten(0, 1)  # (B C, heads, streams, T, head_dim)
        for part in (turn(keys, where.own), values, query)
    )
    fused = watch is None and normed.device.type != "cpu"
    out = fused_attention(own_q, own_k, own_v, pages) if fused else plain_attention(own_q, own_k, own_v, pages, watch)
    return attention.o(out.permute(2, 0, 3, 1, 4).reshape(streams, B, C, T, dim))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, pages: Pages, watch: Watch | None = None) -> Tensor:
    """Streams (B C, heads, streams, T, head_dim) over pages and themselves; scores of all streams in one product."""
    streams, T, head_dim = q.shape[2:]
    far = (q.flatten(2, 3) @ pages.keys.transpose(-1, -2)).masked_fill(pages.hidden, -math.inf)
    near = (q @ k.transpose(-1, -2)).flatten(2, 3)
    scores = torch.cat([far, near], dim=-1) * head_dim**-0.5
    weight = torch.softmax(scores if watch is None else scores.float(), dim=-1)
    if watch is not None:
        watch(weight[..., : far.shape[-1]].unflatten(2, (streams, T)), pages)
    far, near = weight.to(v.dtype).split([far.shape[-1], T], dim=-1)
    return (far @ pages.values).unflatten(2, (streams, T)) + near.unflatten(2, (streams, T)) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, pages: Pages) -> Tensor:
    """The same in one call that keeps no scores, which a GPU has no room for at the size of Wan."""
    n, heads, streams, T, head_dim = q.shape

    def apart(own: Tensor) -> Tensor:
        return own.transpose(1, 2).flatten(0, 1)  # (B C streams, heads, T, head_dim)

    def joined(far: Tensor, own: Tensor) -> Tensor:
        far = far[:, None].expand(-1, streams, -1, -1, -1).flatten(0, 1)
        return torch.cat([far.to(own.dtype), apart(own)], dim=2)

    seen = F.pad(~pages.hidden, (0, T), value=True)  # (B C, 1, 1, L + T)
    seen = seen[:, None].expand(-1, streams, -1, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(apart(q), joined(pages.keys, k), joined(pages.values, v), attn_mask=seen)
    return out.unflatten(0, (n, streams)).transpose(1, 2)


def _cross(block: Block, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    """Attention to the prompt of each chunk; x (G, B, C, T, dim), text (B, C, n, dim), bias (n,)."""
    attention = block.cross_attn
    heads, head_dim = attention.heads, attention.head_dim
    G, B, C, T, dim = x.shape
    affine = (block.norm3.weight.to(x.dtype), block.norm3.bias.to(x.dtype))
    query = _rms(attention.norm_q, attention.q(F.layer_norm(x, (dim,), *affine, eps=block.eps)))
    query = query.permute(1, 2, 0, 3, 4).reshape(B * C, G * T, heads, head_dim).transpose(1, 2)
    key = _rms(attention.norm_k, attention.k(text)).reshape(B * C, -1, heads, head_dim).transpose(1, 2)
    value = attention.v(text).reshape(B * C, -1, heads, head_dim).transpose(1, 2)
    scores = query @ key.transpose(-1, -2) * head_dim**-0.5 + bias.to(query.dtype)
    out = torch.softmax(scores, dim=-1).to(value.dtype) @ value
    return attention.o(out.transpose(1, 2).reshape(B, C, G, T, dim)).permute(2, 0, 1, 3, 4)


def _rms(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm with its weight in x's type, as a fused call wants it."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.eps)


def timestep_features(timestep: Tensor, width: int) -> Tensor:
    """(...,) -> (..., width) float32: [cos | sin] of timestep * 10000^(-i / (width / 2)), angles in float64."""
    half = width // 2
    rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def _patches(model: CausalDiT, latents: Tensor) -> Tensor:
    """(G, B, C, c, channels, h, w) -> tokens (G, B, C, T, dim)."""
    tokens = model.embed(latents.flatten(0, 3))
    return tokens.view(*latents.shape[:3], -1, tokens.shape[-1])


def _modulation(model: CausalDiT, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(G, B, C) -> six (6, G, B, C, 1, dim) of every block before its own offset, embedding (G, B, C, dim)."""
    embedded = model.time_embedding(timestep_features(timestep, model.config.freq_dim))
    six = model.time_projection(embedded).unflatten(-1, (6, -1)).movedim(-2, 0)
    return six[..., None, :], embedded


def _rest(block: Block, x: Tensor, out: Tensor, m: Tensor, context: Context) -> Tensor:
    """The half of a block that follows its self-attention; m (6, streams, B, C, 1, dim)."""
    x = torch.addcmul(x, out, m[2])
    x = x + _cross(block, x, context.prompt, context.bias)
    return x + block.ffn(_normed(x, m[3], m[4], block.eps)) * m[5]


def _normed(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale) + shift


def remember(model: CausalDiT, memory: MemoryConfig, clean: Tensor, text: Tensor) -> Context:
    """Run the clean stream, (B, C, c, channels, h, w) with text (B, C, n, text_dim): what noisy chunks attend to."""
    config, device = model.config, clean.device
    B, C = clean.shape[:2]
    grid = (clean.shape[-2] // config.patch[1], clean.shape[-1] // config.patch[2])
    where = places(C, grid, config.head_dim, config.theta, memory, device)
    n = text.shape[2]
    bias = torch.zeros(n + (n < config.text_len), device=device)
    if n < config.text_len:
        text = F.pad(text, (0, 0, 0, 1))
        bias[-1] = math.log(config.text_len - n)
    context = Context([], model.text_embedding(text), bias, where)
    if C == 1:  # a first chunk sees no page
        return context._replace(layers=[_no_pages(B, config, device)] * config.layers)
    x = _patches(model, clean[None])
    six, _ = _modulation(model, torch.zeros(1, B, C, device=device))
    for number, block in enumerate(model.blocks):
        m = (block.modulation[0][:, None, None, None, None] + six).to(x.dtype)
        normed = _normed(x, m[0], m[1], config.eps)
        keys, values, raw = _project(block, normed, where)
        context.layers.append(_recall(keys[0], values[0], raw[0].detach().float().mean(2), where, memory))
        if number + 1 < config.layers:
            x = _rest(block, x, _attend(block, normed, keys, values, context.layers[-1], where), m, context)
    return context


def flow_from(
    model: CausalDiT,
    context: Context,
    noisy: Tensor,
    timestep: Tensor,
    watch: Callable[[int, Tensor, Pages], None] | None = None,
) -> Tensor:
    """Predict the flow of noisy chunks under a context.

    noisy: (K, B, C, c, channels, h, w)      timestep: (K, B, C), 0 .. 1000      -> as noisy, float32
    watch(block, attention (B C, heads, K, T, L) in float32, pages) sees how every block attends to its page tokens
    """
    config = model.config
    grid = (noisy.shape[-2] // config.patch[1], noisy.shape[-1] // config.patch[2])
    x = _patches(model, noisy)
    six, embedded = _modulation(model, timestep)
    for number, (block, pages) in enumerate(zip(model.blocks, context.layers, strict=True)):
        see = partial(watch, number) if watch else None
        m = (block.modulation[0][:, None, None, None, None] + six).to(x.dtype)
        normed = _normed(x, m[0], m[1], config.eps)
        keys, values, _ = _project(block, normed, context.where)
        x = _rest(block, x, _attend(block, normed, keys, values, pages, context.where, see), m, context)
    shift, scale = (model.head.modulation[0][:, None, None, None, None] + embedded[..., None, :]).unbind(0)
    tokens = model.head.head(_normed(x, shift, scale, config.eps)).float()
    return model.unpatchify(tokens.flatten(0, 3), grid).view(noisy.shape)


def flow(
    model: CausalDiT, memory: MemoryConfig, clean: Tensor, noisy: Tensor, timestep: Tensor, text: Tensor
) -> Tensor:
    """`remember`, then `flow_from`."""
    return flow_from(model, remember(model, memory, clean, text), noisy, timestep)
