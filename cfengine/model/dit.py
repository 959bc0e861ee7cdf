"""Causal Wan 2.1 diffusion transformer: blocks are two halves and a hole where the attention over pages goes.

Parameter names and shapes are the official ones (`wan/modules/model.py` of Wan-Video/Wan2.1), so a published state
dict loads as it is. The modules hold weights and the arithmetic of one chunk; memory and sessions live elsewhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfengine.config import ModelConfig, PrecisionConfig
from cfengine.errors import ConfigError
from cfengine.ops import Ops, reference


class Modulation(NamedTuple):
    """What a timestep does to every block and to the head; float32, computed once per timestep.

    blocks: per layer (6, 1, dim): shift, scale, gate of self-attention, then of the feed-forward
    head: (2, 1, dim): shift, scale
    """

    blocks: list[Tensor]
    head: Tensor


class CrossCache(NamedTuple):
    """Keys and values of a prompt in one layer: k, v (keys, heads, head_dim), bias (keys,) float32."""

    k: Tensor
    v: Tensor
    bias: Tensor


class Product(NamedTuple):
    """A linear layer as it is multiplied: weight (out, in), bias (out,); scale (out,) float32 where weight is e4m3."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor


def timestep_embedding(timestep: float, width: int) -> Tensor:
    """[cos(s) | sin(s)] with s = timestep * 10000^(-i / (width / 2)), computed in float64; (width,) float32."""
    half = width // 2
    angle = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angle.cos(), angle.sin()]).float()


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the full width."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Projections of an attention; the attention itself is an operation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.head_dim = config.heads, config.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """(tokens, dim) -> (tokens, heads, head_dim)"""
        return x.unflatten(-1, (self.heads, self.head_dim))


class Block(nn.Module):
    """x += gate * attention(norm x);  x += cross(norm3 x);  x += gate * ffn(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    @torch.no_grad()
    def prepare(self, fp8: frozenset[str] = frozenset(), fp8_after: bool = False) -> None:
        """Store q, k, v weights side by side, so that one product serves all three; the parameters become views.

        fp8: products (`config.PRODUCTS`) whose weights are rounded to e4m3, one scale an output channel; their
        parameters are let go      fp8_after: what follows this block takes its norm in e4m3
        """
        attention = self.self_attn
        parts = (attention.q, attention.k, attention.v)
        dim = attention.q.weight.shape[0]
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        for i, part in enumerate(parts):
            part.weight.data, part.bias.data = weight[i * dim : (i + 1) * dim], bias[i * dim : (i + 1) * dim]
        cross = self.cross_attn
        layers = {
            "self_attn.o": attention.o,
            "cross_attn.q": cross.q,
            "cross_attn.o": cross.o,
            "ffn.0": self.ffn[0],
            "ffn.2": self.ffn[2],
        }
        self.products = {name: Product(layer.weight.data, None, layer.bias.data) for name, layer in layers.items()}
        self.products["self_attn.qkv"] = Product(weight, None, bias)
        for name in fp8:
            wide = self.products[name]
            self.products[name] = Product(*reference("quantise_rows")(wide.weight), wide.bias)
            for layer in parts if name == "self_attn.qkv" else (layers[name],):
                layer.weight.data = layer.weight.data.new_empty(0)
        self.fp8, self.fp8_after = fp8, fp8_after
        self.norm3_shift, self.norm3_scale = self.norm3.bias.float()[None], self.norm3.weight.float()[None] - 1

    def project(self, ops: Ops, name: str, rows, *, gelu: bool = False, first: int = 0) -> Tensor:
        """A product of PRODUCTS, from output channel `first`: (tokens, in) or e4m3 rows -> (tokens, out)."""
        weight, scale, bias = self.products[name]
        if scale is None:
            rows = F.gelu(rows, approximate="tanh") if gelu else rows
            return F.linear(rows, weight[first:], bias[first:])
        if torch.is_tensor(rows):
            rows = ops.quantise_rows(rows, gelu=gelu)
        return ops.linear_fp8(*rows, weight[first:], scale[first:], bias[first:], dtype=bias.dtype)

    def pre_attention(self, ops: Ops, normed, *, keys_only: bool = False) -> tuple[Tensor | None, Tensor, Tensor]:
        """Project the modulated norm (tokens, dim) to q, k, v (tokens, dim), before norms; q is None for keys_only.

        normed: e4m3 `Rows` where "self_attn.qkv" is in `fp8`
        """
        dim = self.self_attn.norm_k.weight.shape[0]
        if keys_only:
            return None, *self.project(ops, "self_attn.qkv", normed, first=dim).split(dim, dim=-1)
        return self.project(ops, "self_attn.qkv", normed).split(dim, dim=-1)

    def post_attention(
        self, ops: Ops, x: Tensor, attended: Tensor, modulation: Tensor, cross: CrossCache, after, observe=None
    ):
        """Everything that follows the attention; returns x and the norm that the next half starts with.

        x: (tokens, dim), updated in place      attended: (tokens, heads, head_dim)      modulation: (6, 1, dim)
        after: (shift, scale) of the norm of the next block or the head
        """
        _, _, gate, shift, scale, ffn_gate = modulation
        out = self.project(ops, "self_attn.o", attended.flatten(-2))
        x, normed = self._add(ops, x, out, gate, self.norm3_shift, self.norm3_scale, "cross_attn.q" in self.fp8)
        attention = self.cross_attn
        q = attention.split(attention.norm_q(self.project(ops, "cross_attn.q", normed)))
        context = self.project(ops, "cross_attn.o", ops.cross_attention(q, *cross).flatten(-2))
        x, normed = self._add(ops, x, context, None, shift, scale, "ffn.0" in self.fp8)
        hidden = self.project(ops, "ffn.0", normed)
        fed = self.project(ops, "ffn.2", hidden, gelu=True)
        x, normed = self._add(ops, x, fed, ffn_gate, *after, self.fp8_after)
        if observe:
            observe("self_attn", out)
            observe("cross_attn", context)
            observe("", x)
        return x, normed

    def _add(self, ops: Ops, x: Tensor, y: Tensor, gate, shift: Tensor, scale: Tensor, fp8: bool):
        """x + y * gate in place, and the norm of the sum, in e4m3 where the product that follows is."""
        return ops.gated_residual(x, y, gate, shift, scale, eps=self.eps, fp8=fp8)


class Head(nn.Module):
    """Projection to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, config.out_channels * math.prod(config.patch))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)


class CausalDiT(nn.Module):
    """The transformer of one chunk. `prepare()` must run once after the weights are final."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def prepare(self, precision: PrecisionConfig | None = None) -> CausalDiT:
        """Freeze the weights and lay them out for inference, those that `precision` names in e4m3."""
        self.requires_grad_(False).eval()
        precision = precision or PrecisionConfig()
        fp8 = [precision.fp8_products(block) for block in range(len(self.blocks))]
        for block, now, after in zip(self.blocks, fp8, [*fp8[1:], frozenset()], strict=True):
            block.prepare(now, "self_attn.qkv" in after)
        return self

    def embed(self, latents: Tensor) -> Tensor:
        """(frames, channels, height, width) -> tokens (frames * rows * columns, dim), frame by frame, row by row."""
        _, ph, pw = self.config.patch
        frames, channels, height, width = latents.shape
        if height % ph or width % pw or channels != self.config.in_channels:
            raise ConfigError(
                f"latent of {channels} channels, {height}x{width}, does not fit a model of "
                f"{self.config.in_channels} channels and patches of {ph}x{pw}"
            )
        patches = latents.to(self.dtype).unflatten(-1, (-1, pw)).unflatten(-3, (-1, ph))  # f c R p C q
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(tokens, patch row * patch column * channel) -> (frames, channels, height, width)"""
        _, ph, pw = self.config.patch
        patches = tokens.unflatten(-1, (ph, pw, -1)).unflatten(0, (-1, *grid))  # f R C p q c
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def modulate(self, timestep: float) -> Modulation:
        """Time embedding, projection and per-block sums, in float32; one timestep for the whole chunk."""
        device = self.patch_embedding.weight.device
        e = self.embed_time(timestep)
        e6 = self.project_time(e)
        blocks = [(block.modulation.float()[0] + e6)[:, None].to(device) for block in self.blocks]
        return Modulation(blocks, (self.head.modulation.float()[0] + e)[:, None])

    def embed_time(self, timestep: float) -> Tensor:
        """(dim,) float32"""
        first, _, second = self.time_embedding
        s = timestep_embedding(timestep, self.config.freq_dim).to(first.weight.device)
        hidden = F.silu(F.linear(s, first.weight.float(), first.bias.float()))
        return F.linear(hidden, second.weight.float(), second.bias.float())

    def project_time(self, e: Tensor) -> Tensor:
        """(dim,) -> (6, dim) float32"""
        linear = self.time_projection[1]
        return F.linear(F.silu(e), linear.weight.float(), linear.bias.float()).view(6, -1)

    @torch.no_grad()
    def project_text(self, embeds: Tensor) -> list[CrossCache]:
        """Cross-attention keys and values of a prompt, per layer.

        embeds: (n, text_dim) live tokens.  The text_len - n rows of padding are zero and attended to; being equal they
        become one key with bias log(text_len - n).
        """
        n, text_len = embeds.shape[0], self.config.text_len
        if embeds.shape[-1] != self.config.text_dim or not 0 < n <= text_len:
            raise ConfigError(
                f"prompt embedding is {tuple(embeds.shape)}; the model takes 1 to {text_len} tokens "
                f"of width {self.config.text_dim}"
            )
        rows = embeds.to(self.patch_embedding.weight)
        bias = torch.zeros(n, device=rows.device)
        if n < text_len:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            bias = torch.cat([bias, bias.new_full((1,), math.log(text_len - n))])
        context = self.text_embedding(rows)
        caches = []
        for block in self.blocks:
            attention = block.cross_attn
            k, v = attention.split(attention.norm_k(attention.k(context))), attention.split(attention.v(context))
            caches.append(CrossCache(k, v, bias))
        return caches
