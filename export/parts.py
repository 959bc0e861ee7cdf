"""The parts of a model that become graphs: what each computes, from which operands, with which weights.

A part is the model's own code, called with weights by name. So there is one meaning: what is exported is what
`TorchSegments` runs, but for the residual sum, which is not made in place, and the attention to the prompt, which takes
several sessions at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfengine.config import EngineConfig
from cfengine.model.dit import Attention, Block, CausalDiT
from cfengine.ops import Ops, reference, select

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Port:
    """An operand as it is exported: its type, its shape, and the sizes that symbols have in the example."""

    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True)
class Part:
    """One graph to be: a module, its operands by name, and its weight sets.

    weights[i]() -> tensors by the module's parameter names, the same names, types and shapes for every i
    """

    name: str
    module: nn.Module
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    weights: tuple[Callable[[], dict[str, Tensor]], ...]
    file: str = ""  # stem of the weight files where another part has the same


def exported_ops() -> Ops:
    """The references, with a residual sum that leaves x as it is and cross-attention over a batch of sessions."""
    ops = select("cpu", prefer="reference")
    add = reference("gated_residual")

    def gated_residual(x: Tensor, *args: Any, **options: Any):
        return add(x.clone(), *args, **options)

    return dataclasses.replace(ops, gated_residual=gated_residual, cross_attention=cross_attention)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The reference's attention for all sessions at once.

    q: (sessions * tokens, heads, head_dim)      k, v: (sessions, keys, heads, head_dim)      bias: (sessions, keys)
    """
    query = q.unflatten(0, (k.shape[0], -1)).transpose(1, 2)
    # one row a token, though all are equal: ONNX Runtime's Attention does not broadcast a mask over queries
    mask = bias[:, None, None].expand(-1, -1, query.shape[2], -1)
    out = F.scaled_dot_product_attention(query, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)


class Linear(nn.Module):
    """A product whose weights are given."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = _kept(weight), _kept(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Pre(nn.Module):
    """First half of a block: the modulated norm to q, k, v."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        weight, _, bias = block.products["self_attn.qkv"]
        self.self_attn.qkv = Linear(weight, bias)

    def forward(self, normed: Tensor) -> tuple[Tensor, ...]:
        return self.self_attn.qkv(normed).chunk(3, dim=-1)


class Post(Block):
    """Second half of a block; `Block.post_attention` with parameters in place of prepared products."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.eps, self.fp8, self.fp8_after = block.eps, frozenset(), False
        self.self_attn, self.cross_attn, self.ffn, self.norm3 = (nn.Module() for _ in range(4))
        self.self_attn.o = _linear(block.self_attn.o)
        self.cross_attn = _Cross(block.cross_attn)
        self.ffn = nn.ModuleDict({"0": _linear(block.ffn[0]), "2": _linear(block.ffn[2])})
        self.norm3.shift, self.norm3.scale = _kept(block.norm3_shift), _kept(block.norm3_scale)

    @property
    def norm3_shift(self) -> Tensor:
        return self.norm3.shift

    @property
    def norm3_scale(self) -> Tensor:
        return self.norm3.scale

    def project(self, ops: Ops, name: str, rows: Tensor, *, gelu: bool = False, first: int = 0) -> Tensor:
        """See `Block.project`."""
        return self.get_submodule(name)(F.gelu(rows, approximate="tanh") if gelu else rows)


class _Cross(nn.Module):
    """What the second half of a block needs of its attention to the prompt."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.head_dim = attention.heads, attention.head_dim
        self.q, self.o, self.norm_q = _linear(attention.q), _linear(attention.o), attention.norm_q

    split = Attention.split


class First(nn.Module):
    """Patch embedding and the first half of block 0."""

    def __init__(self, model: CausalDiT, ops: Ops) -> None:
        super().__init__()
        self.config, self._ops, self._eps = model.config, ops, model.blocks[0].eps
        embedding = model.patch_embedding
        self.patch_embedding = Linear(embedding.weight.flatten(1), embedding.bias)
        self.pre = Pre(model.blocks[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def forward(self, latents: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        x = CausalDiT.embed(self, latents)
        return x, *self.pre(self._ops.modulated_norm(x, modulation[0], modulation[1], eps=self._eps))


class Middle(nn.Module):
    """Second half of a block and first half of the next."""

    def __init__(self, block: Block, following: Block, ops: Ops) -> None:
        super().__init__()
        self._ops, self.post, self.pre = ops, Post(block), Pre(following)

    def forward(
        self, x: Tensor, attended: Tensor, modulation: Tensor, modulation_next: Tensor, *cross: Tensor
    ) -> tuple[Tensor, ...]:
        after = modulation_next[0], modulation_next[1]
        x, normed = self.post.post_attention(self._ops, x, attended, modulation, cross, after)
        return x, *self.pre(normed)


class Last(nn.Module):
    """Second half of the last block, and the head."""

    def __init__(self, model: CausalDiT, ops: Ops, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self._ops, self._grid = model.config, ops, grid
        self.post, self.head = Post(model.blocks[-1]), _linear(model.head.head)

    def forward(
        self, x: Tensor, attended: Tensor, modulation: Tensor, modulation_head: Tensor, *cross: Tensor
    ) -> Tensor:
        after = modulation_head[0], modulation_head[1]
        _, normed = self.post.post_attention(self._ops, x, attended, modulation, cross, after)
        return CausalDiT.unpatchify(self, self.head(normed), self._grid)


class Time(nn.Module):
    """Time embedding, its projection, and the modulations of all blocks and the head; see `CausalDiT.modulate`."""

    def __init__(self, model: CausalDiT) -> None:
        super().__init__()
        first, _, second = model.time_embedding
        self.time_embedding = nn.ModuleDict({"0": _linear(first), "2": _linear(second)})
        self.time_projection = _linear(model.time_projection[1])
        self.blocks_modulation = _kept(torch.cat([block.modulation for block in model.blocks]))
        self.head_modulation = _kept(model.head.modulation[0])

    def forward(self, sinusoid: Tensor) -> tuple[Tensor, Tensor]:
        e = self.time_embedding["2"](F.silu(self.time_embedding["0"](sinusoid)))
        e6 = self.time_projection(F.silu(e)).unflatten(0, (6, -1))
        return (self.blocks_modulation + e6)[:, :, None], (self.head_modulation + e)[:, None]


class Text(nn.Module):
    """Prompt embedding to the width of the model."""

    def __init__(self, model: CausalDiT) -> None:
        super().__init__()
        first, _, second = model.text_embedding
        self.text_embedding = nn.ModuleDict({"0": _linear(first), "2": _linear(second)})

    def forward(self, embeds: Tensor) -> Tensor:
        return self.text_embedding["2"](F.gelu(self.text_embedding["0"](embeds), approximate="tanh"))


class CrossKeys(nn.Module):
    """Keys and values of a prompt in one block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention = block.cross_attn
        self.heads, self.head_dim = attention.heads, attention.head_dim
        self.k, self.v, self.norm_k = _linear(attention.k), _linear(attention.v), attention.norm_k

    split = Attention.split

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(context))), self.split(self.v(context))


def dit_parts(config: EngineConfig, model: CausalDiT, dtype: torch.dtype, sessions: int | str) -> list[Part]:
    """All graphs of a prepared transformer, for chunks of the configured size."""
    ops, blocks, c = exported_ops(), model.blocks, config.model
    frames, tokens = config.memory.chunk_frames, config.memory.chunk_frames * config.page_tokens
    latent = config.video.latent_height, config.video.latent_width
    rows = Port(dtype, (times(tokens, sessions), c.dim))
    six, two = Port(torch.float32, (6, 1, c.dim)), Port(torch.float32, (2, 1, c.dim))
    keys = Port(dtype, (sessions, "keys", c.heads, c.head_dim))
    prompt = {"cross_k": keys, "cross_v": keys, "cross_bias": Port(torch.float32, (sessions, "keys"))}
    second = {"x": rows, "attended": Port(dtype, (times(tokens, sessions), c.heads, c.head_dim)), "modulation": six}
    qkv = {"q": rows, "k": rows, "v": rows}
    latents = Port(torch.float32, (times(frames, sessions), c.in_channels, *latent))
    flow = Port(dtype, (times(frames, sessions), c.out_channels, *latent))
    one_cross = Port(dtype, ("keys", c.heads, c.head_dim))
    modulations = {"modulations": Port(torch.float32, (c.layers, 6, 1, c.dim)), "modulation_head": two}
    embeds, context = Port(dtype, ("keys", c.text_dim)), Port(dtype, ("keys", c.dim))

    def part(name: str, inputs: dict[str, Port], outputs: dict[str, Port], build: Callable, sets: int = 1) -> Part:
        wide = torch.float32 if name == "time" else dtype
        return Part(name, build(0), inputs, outputs, tuple(lambda i=i: weights_of(build(i), wide) for i in range(sets)))

    parts = [
        part("first", {"latents": latents, "modulation": six}, {"x": rows, **qkv}, lambda _: First(model, ops)),
        part(
            "last", second | {"modulation_head": two} | prompt, {"flow": flow}, lambda _: Last(model, ops, config.grid)
        ),
        part("time", {"sinusoid": Port(torch.float32, (c.freq_dim,))}, modulations, lambda _: Time(model)),
        part("text", {"embeds": embeds}, {"context": context}, lambda _: Text(model)),
        part(
            "cross",
            {"context": context},
            {"cross_k": one_cross, "cross_v": one_cross},
            lambda i: CrossKeys(blocks[i]),
            c.layers,
        ),
    ]
    if c.layers > 1:
        parts.insert(
            1,
            part(
                "middle",
                second | {"modulation_next": six} | prompt,
                {"x_out": rows, **qkv},
                lambda i: Middle(blocks[i], blocks[i + 1], ops),
                c.layers - 1,
            ),
        )
    return parts


def times(size: int, sessions: int | str) -> int | str:
    """`size` for every session, as a dimension."""
    return size * sessions if isinstance(sessions, int) else f"{size}*{sessions}"


def weights_of(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's parameters and buffers by name; scale and shift of a norm stay in float32, as it is computed."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: tensor.detach().to("cpu", torch.float32 if name.endswith((".scale", ".shift")) else dtype).contiguous()
        for name, tensor in state.items()
    }


def _linear(layer: nn.Linear) -> Linear:
    return Linear(layer.weight, layer.bias)


def _kept(tensor: Tensor) -> nn.Parameter:
    """A parameter that shares the tensor's memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
