"""The batched, differentiable forward: every chunk of many sessions at once, each under its own Slow-Fast memory.

Teacher forcing in streams. Stream 0 is clean (timestep 0): its keys and values become pages, as in the engine's clean
pass. The other streams hold noisy copies of the same chunks; a noisy chunk attends to the pages of the chunks before
it and to itself. The memory is policy `slow_fast_paper`: sink = chunk 0, fast = the chunk before, slow = first pages of
marked odd chunks that have left fast memory, newest `slow` of them. Slots have fixed places: slow slot k (0 = newest)
sits at position anchor - 6 - k, so only the table of page ids depends on the data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cfengine.config import MemoryConfig
from cfengine.kernels.rope import axis_frequencies, axis_pairs
from cfengine.model.dit import Block, CausalDiT, RMSNorm


class Places(NamedTuple):
    """Rotations of a sequence of chunks, as pairs (cosine, signed sine) over all channels of a head.

    query: (chunks, tokens, 1, head_dim) full      page: (tokens, 1, head_dim) rows and columns
    own: (chunks, tokens, 1, head_dim) time      context: (chunks, slots, 1, 1, head_dim) time
    slow: slots of slow memory
    """

    query: tuple[Tensor, Tensor]
    page: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]
    context: tuple[Tensor, Tensor]
    slow: int


def rotation(angle: Tensor, first: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Angles (..., n) of pairs first .. first + n of `pairs` -> cosine and signed sine (..., 2 pairs) float32."""
    full = F.pad(angle, (first, pairs - first - angle.shape[-1]))
    sine = full.sin()
    return full.cos().repeat_interleave(2, dim=-1).float(), torch.stack([-sine, sine], dim=-1).flatten(-2).float()


def turn(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate interleaved pairs of x (..., head_dim): (a, b) -> (a cos - b sin, b cos + a sin)."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * by[0].to(x.dtype) + swapped * by[1].to(x.dtype)


def places(chunks: int, grid: tuple[int, int], head_dim: int, theta: float, memory: MemoryConfig) -> Places:
    """Tables for sequences of `chunks` chunks; slots in the order sink, fast, slow (newest first)."""
    c, pairs = memory.chunk_frames, head_dim // 2
    time_pairs, row_pairs, column_pairs = axis_pairs(head_dim)
    rate = axis_frequencies(time_pairs, theta)
    slow = min(memory.slow, max(0, (chunks - 2) // 2))
    anchor = torch.clamp(c * torch.arange(chunks) + c - 1, max=memory.rope_length - 1)
    own = anchor[:, None] - (c - 1) + torch.arange(c)
    sink = torch.arange(memory.sink).expand(chunks, -1)
    past = anchor[:, None] - 2 * c - torch.arange(slow)
    slots = torch.cat([sink, own - c, past], dim=1).double()
    row = torch.arange(grid[0]).double()[:, None, None] * axis_frequencies(row_pairs, theta)
    column = torch.arange(grid[1]).double()[None, :, None] * axis_frequencies(column_pairs, theta)
    spatial = torch.cat([row.expand(-1, grid[1], -1), column.expand(grid[0], -1, -1)], dim=-1).flatten(0, 1)
    spatial = spatial.repeat(c, 1)[:, None]  # (tokens, 1, spatial pairs)
    own_angle = (own.double()[..., None] * rate).repeat_interleave(grid[0] * grid[1], dim=1)[:, :, None]
    slot_angle = (slots[..., None] * rate)[:, :, None, None]
    both = torch.cat([own_angle, spatial.expand(chunks, -1, -1, -1)], dim=-1)
    return Places(
        query=rotation(both, 0, pairs),
        page=rotation(spatial, time_pairs, pairs),
        own=rotation(own_angle, 0, pairs),
        context=rotation(slot_angle, 0, pairs),
        slow=slow,
    )


def page_table(key_mean: Tensor, memory: MemoryConfig, slow: int) -> tuple[Tensor, Tensor]:
    """Which pages each chunk sees besides its own.

    key_mean: (B, chunks, dim), mean raw key of every clean chunk
    -> pages (B, chunks, slots) as frame numbers 0 .. B * chunks * chunk_frames - 1, valid (B, chunks, slots) bool
    """
    B, C, _ = key_mean.shape
    c = memory.chunk_frames
    chunk = torch.arange(C)
    similarity = F.cosine_similarity(key_mean[:, 1:].double(), key_mean[:, :-1].double(), dim=-1)
    marked = torch.cat([similarity.new_zeros(B, 1, dtype=torch.bool), similarity < memory.threshold], dim=1)
    joined = (marked & (chunk % 2 == 1))[:, None] & (chunk <= chunk[:, None] - 2)  # (B, seeing chunk, seen chunk)
    rank = joined.flip(-1).cumsum(-1).flip(-1) - 1  # 0 = newest
    place = torch.where(joined & (rank < slow), rank, slow)
    newest = torch.full((B, C, slow + 1), -1).scatter(-1, place, (c * chunk).expand(B, C, C))[..., :slow]
    sink = torch.where(chunk[:, None] >= 1, torch.arange(memory.sink), -1).expand(B, -1, -1)
    fast = torch.where(chunk[:, None] >= 2, c * (chunk[:, None] - 1) + torch.arange(c), -1).expand(B, -1, -1)
    pages = torch.cat([sink, fast, newest], dim=-1)
    return pages.clamp(min=0) + (C * c * torch.arange(B))[:, None, None], pages >= 0


def _attend(block: Block, normed: Tensor, where: Places, memory: MemoryConfig, streams: int) -> Tensor:
    """Self-attention of the last `streams` streams over the pages of stream 0; normed (G, B, C, T, dim)."""
    attention = block.self_attn
    G, B, C, T, dim = normed.shape
    c, heads, head_dim = memory.chunk_frames, attention.heads, attention.head_dim
    keys = _rms(attention.norm_k, attention.k(normed))
    pages, valid = page_table(keys[0].detach().float().mean(2), memory, where.slow)
    keys = keys.unflatten(-1, (heads, head_dim))
    keys = turn(keys, where.page)
    values = attention.v(normed).unflatten(-1, (heads, head_dim))
    query = _rms(attention.norm_q, attention.q(normed[G - streams :])).unflatten(-1, (heads, head_dim))
    query = turn(query, where.query)
    seen = [
        pool[0].reshape(B * C * c, T // c, heads, head_dim)[pages.flatten()].unflatten(0, (B, C, -1))
        for pool in (keys, values)
    ]
    pages_k = turn(seen[0], where.context).flatten(2, 3).flatten(0, 1).transpose(1, 2)  # (B C, heads, L, head_dim)
    pages_v = seen[1].flatten(2, 3).flatten(0, 1).transpose(1, 2)
    own_k, own_v, own_q = (
        part.permute(1, 2, 4, 0, 3, 5).flatten(0, 1)  # (B C, heads, streams, T, head_dim)
        for part in (turn(keys[G - streams :], where.own), values[G - streams :], query)
    )
    far = own_q.flatten(2, 3) @ pages_k.transpose(-1, -2)
    far = far.masked_fill(~valid.flatten(0, 1).repeat_interleave(T // c, dim=-1)[:, None, None], -math.inf)
    near = (own_q @ own_k.transpose(-1, -2)).flatten(2, 3)
    weight = torch.softmax(torch.cat([far, near], dim=-1) * head_dim**-0.5, dim=-1).to(own_v.dtype)
    far, near = weight.split([far.shape[-1], T], dim=-1)
    out = (far @ pages_v).unflatten(2, (streams, T)) + near.unflatten(2, (streams, T)) @ own_v
    return attention.o(out.permute(2, 0, 3, 1, 4).reshape(streams, B, C, T, dim))


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
    angle = timestep.double()[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def _patches(model: CausalDiT, latents: Tensor) -> Tensor:
    """(G, B, C, c, channels, h, w) -> tokens (G, B, C, T, dim)."""
    tokens = model.embed(latents.flatten(0, 3))
    return tokens.view(*latents.shape[:3], -1, tokens.shape[-1])


def flow(
    model: CausalDiT, memory: MemoryConfig, clean: Tensor, noisy: Tensor, timestep: Tensor, text: Tensor
) -> Tensor:
    """Predict the flow of noisy chunks under the memory of the clean ones.

    clean: (B, C, c, channels, h, w)      noisy: (K, B, C, c, channels, h, w)      timestep: (K, B, C), 0 .. 1000
    text: (B, C, n, text_dim)      ->  (K, B, C, c, channels, h, w) float32
    """
    config = model.config
    K, B, C = noisy.shape[:3]
    grid = (clean.shape[-2] // config.patch[1], clean.shape[-1] // config.patch[2])
    where = places(C, grid, config.head_dim, config.theta, memory)
    x = _patches(model, torch.cat([clean[None], noisy]))
    clock = torch.cat([torch.zeros(1, B, C), timestep])
    embedded = model.time_embedding(timestep_features(clock, config.freq_dim))
    six = model.time_projection(embedded).unflatten(-1, (6, -1))[..., None, :, :].movedim(-2, 0)  # (6, G, B, C, 1, dim)
    n = text.shape[2]
    rows = F.pad(text, (0, 0, 0, 1)) if n < config.text_len else text
    bias = torch.zeros(rows.shape[2])
    if n < config.text_len:
        bias[-1] = math.log(config.text_len - n)
    prompt = model.text_embedding(rows)
    width = (config.dim,)
    for number, block in enumerate(model.blocks):
        m = (block.modulation[0][:, None, None, None, None] + six).to(x.dtype)
        streams = K if number == config.layers - 1 else K + 1
        normed = F.layer_norm(x, width, eps=config.eps) * (1 + m[1]) + m[0]
        out = _attend(block, normed, where, memory, streams)
        x, m = x[K + 1 - streams :], m[:, K + 1 - streams :]
        x = torch.addcmul(x, out, m[2])
        x = x + _cross(block, x, prompt, bias)
        x = x + block.ffn(F.layer_norm(x, width, eps=config.eps) * (1 + m[4]) + m[3]) * m[5]
    shift, scale = (model.head.modulation[0][:, None, None, None, None] + embedded[1:, ..., None, :]).unbind(0)
    tokens = model.head.head(F.layer_norm(x, width, eps=config.eps) * (1 + scale) + shift).float()
    return model.unpatchify(tokens.flatten(0, 3), grid).view(noisy.shape)
