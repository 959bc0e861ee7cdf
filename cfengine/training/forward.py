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
from cfengine.kernels.rope import axis_frequencies, axis_pairs, spatial_table
from cfengine.model.dit import Block, CausalDiT


class Places(NamedTuple):
    """Rotations of a sequence of chunks: cosine and sine, pairs last.

    query: (chunks, tokens, 1, pairs) full      page: (page_tokens, 1, spatial pairs)
    own: (chunks, tokens, 1, time pairs)      context: (chunks, slots, 1, 1, time pairs)      slow: slots of slow memory
    """

    query: tuple[Tensor, Tensor]
    page: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]
    context: tuple[Tensor, Tensor]
    slow: int


def turn(x: Tensor, rotation: tuple[Tensor, Tensor], first: int = 0) -> Tensor:
    """Rotate the pairs of x (..., head_dim) from pair `first` on; pairs outside the rotation pass through."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    span = slice(2 * first, 2 * (first + cosine.shape[-1]))
    even, odd = x[..., span].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
    return torch.cat([x[..., : span.start], turned, x[..., span.stop :]], dim=-1)


def places(chunks: int, grid: tuple[int, int], head_dim: int, theta: float, memory: MemoryConfig) -> Places:
    """Tables for sequences of `chunks` chunks; slots in the order sink, fast, slow (newest first)."""
    c = memory.chunk_frames
    time_pairs = axis_pairs(head_dim)[0]
    rate = axis_frequencies(time_pairs, theta)
    slow = min(memory.slow, max(0, (chunks - 2) // 2))
    anchor = torch.clamp(c * torch.arange(chunks) + c - 1, max=memory.rope_length - 1)
    own = anchor[:, None] - (c - 1) + torch.arange(c)
    sink = torch.arange(memory.sink).expand(chunks, -1)
    past = anchor[:, None] - 2 * c - torch.arange(slow)
    slots = torch.cat([sink, own - c, past], dim=1).double()
    spatial = spatial_table(*grid, head_dim, theta)[:, None]
    page = (spatial[..., 0], spatial[..., 1])
    own_angle = (own.double()[..., None] * rate).repeat_interleave(grid[0] * grid[1], dim=1)[:, :, None]
    slot_angle = (slots[..., None] * rate)[:, :, None, None]
    wide = [part.repeat(c, 1, 1).expand(chunks, -1, -1, -1) for part in page]
    own_pair = (own_angle.cos().float(), own_angle.sin().float())
    query = tuple(torch.cat([t, s], dim=-1) for t, s in zip(own_pair, wide, strict=True))
    return Places(query, page, own_pair, (slot_angle.cos().float(), slot_angle.sin().float()), slow)


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
    time_pairs = where.own[0].shape[-1]
    keys = attention.norm_k(attention.k(normed))
    pages, valid = page_table(keys[0].detach().float().mean(2), memory, where.slow)
    keys = keys.unflatten(-1, (heads, head_dim))
    spatial = tuple(part.repeat(c, 1, 1) for part in where.page)
    keys = turn(keys, spatial, time_pairs)
    values = attention.v(normed).unflatten(-1, (heads, head_dim))
    query = attention.norm_q(attention.q(normed[G - streams :])).unflatten(-1, (heads, head_dim))
    query = turn(query, where.query)
    seen = [
        pool[0].reshape(B * C * c, T // c, heads, head_dim)[pages.flatten()].unflatten(0, (B, C, -1))
        for pool in (keys, values)
    ]
    context_keys = turn(seen[0], where.context).flatten(2, 3)
    own_keys, own_values = turn(keys[G - streams :], where.own), values[G - streams :]
    wide = [part.expand(streams, *part.shape) for part in (context_keys, seen[1].flatten(2, 3))]
    key = torch.cat([wide[0], own_keys], dim=3).flatten(0, 2).transpose(1, 2)
    value = torch.cat([wide[1], own_values], dim=3).flatten(0, 2).transpose(1, 2)
    mask = torch.cat([valid.repeat_interleave(T // c, dim=-1), valid.new_ones(B, C, T)], dim=-1)
    mask = torch.zeros(mask.shape, dtype=key.dtype).masked_fill(~mask, -math.inf)
    mask = mask.flatten(0, 1).repeat(streams, 1)[:, None, None].expand(-1, heads, T, -1)
    out = F.scaled_dot_product_attention(query.flatten(0, 2).transpose(1, 2), key, value, attn_mask=mask)
    return attention.o(out.transpose(1, 2).flatten(2)).view(streams, B, C, T, dim)


def _cross(block: Block, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    """Attention to the prompt of each chunk; x (G, B, C, T, dim), text (B, C, n, dim), bias (n,)."""
    attention = block.cross_attn
    heads, head_dim = attention.heads, attention.head_dim
    G, B, C, T, dim = x.shape
    query = attention.norm_q(attention.q(block.norm3(x))).permute(1, 2, 0, 3, 4).reshape(B * C, G * T, heads, head_dim)
    key = attention.norm_k(attention.k(text)).reshape(B * C, -1, heads, head_dim)
    value = attention.v(text).reshape(B * C, -1, heads, head_dim)
    parts = (part.transpose(1, 2) for part in (query, key.to(query.dtype), value.to(query.dtype)))
    mask = bias.to(query.dtype).expand(B * C, heads, G * T, -1)
    out = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).reshape(B, C, G, T, dim)
    return attention.o(out).permute(2, 0, 1, 3, 4)


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
        m = block.modulation[0][:, None, None, None, None] + six
        streams = K if number == config.layers - 1 else K + 1
        normed = F.layer_norm(x, width, eps=config.eps) * (1 + m[1]) + m[0]
        out = _attend(block, normed, where, memory, streams)
        x, m = x[K + 1 - streams :], m[:, K + 1 - streams :]
        x = x + out * m[2]
        x = x + _cross(block, x, prompt, bias)
        x = x + block.ffn(F.layer_norm(x, width, eps=config.eps) * (1 + m[4]) + m[3]) * m[5]
    shift, scale = (model.head.modulation[0][:, None, None, None, None] + embedded[1:, ..., None, :]).unbind(0)
    tokens = model.head.head(F.layer_norm(x, width, eps=config.eps) * (1 + scale) + shift).float()
    return model.unpatchify(tokens.flatten(0, 3), grid).view(noisy.shape)
