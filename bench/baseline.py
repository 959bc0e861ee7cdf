"""The named baseline `reference_method`: the released method of Context Forcing in straightforward torch.

It follows `wan/modules/causal_model.py` and `pipeline/causal_long_inference.py` of TIGER-AI-Lab/Context-Forcing
(f44bac69) in what is done, not in how it is written: every pass recomputes the text MLP, keeps raw keys, rotates
the whole cache again in complex float64, rolls by cloning, reads cache indices back to the host, attends with torch
SDPA, and runs norms and gates unfused; a chunk costs 4 denoise passes and a complete clean pass, head included.
Nothing else is slow on purpose: `bench.cpu` prints its time over the time of its multiplications alone.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cfengine.config import MemoryConfig, ModelConfig, SamplerConfig
from cfengine.errors import ConfigError

TRAIN_STEPS = 1000  # length of the schedule that SamplerConfig.steps index
RANGES = ("rotate", "text", "promote", "store")  # methods that `watched` shows to torch.profiler
ROPE_ROWS = 1024  # positions in the rotary table


@dataclass
class LayerCache:
    """State of one layer. k, v: (slots * page_tokens, heads, head_dim), k raw (normed, not rotated).

    end, seen: tokens in use and tokens seen, kept as tensors and read back on every pass, as the reference does.
    cross: keys and values of the prompt, computed once.
    """

    k: torch.Tensor
    v: torch.Tensor
    end: torch.Tensor
    seen: torch.Tensor
    sources: list[int]
    promoted: int = 0
    last_key: torch.Tensor | None = None
    cross: tuple[torch.Tensor, torch.Tensor] | None = None
    action: str = "none"


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the full width, in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def layer_norm(x, eps, weight=None, bias=None):
    """Layer norm in float32, cast back."""
    if weight is not None:
        weight, bias = weight.float(), bias.float()
    return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, eps).to(x.dtype)


def attend(q, k, v):
    """softmax(q k / sqrt(head_dim)) v.  q: (tokens, heads, head_dim)   k, v: (keys, same)   -> (tokens, dim)."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)


def rope_table(head_dim, theta):
    """exp(i * position * theta^(-j/m)), (ROPE_ROWS, m) complex128, for the pairs of time, rows and columns."""
    spatial = head_dim // 6
    tables = []
    for pairs in (head_dim // 2 - 2 * spatial, spatial, spatial):
        rate = theta ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
        angle = torch.outer(torch.arange(ROPE_ROWS, dtype=torch.float64), rate)
        tables.append(torch.polar(torch.ones_like(angle), angle))
    return tables


class Schedule:
    """Flow matching with a shift: sigma = s u / (1 + (s - 1) u), u = 1 - i / 1000, timestep = 1000 sigma (float32)."""

    def __init__(self, config: SamplerConfig) -> None:
        u = 1 - torch.arange(TRAIN_STEPS, dtype=torch.float32) / TRAIN_STEPS
        self.sigmas = config.shift * u / (1 + (config.shift - 1) * u)
        self.timesteps = self.sigmas * TRAIN_STEPS
        self.warped = [float(self.timesteps[TRAIN_STEPS - step]) for step in config.steps]

    def sigma(self, timestep):
        """Sigma of the nearest timestep, float64."""
        return self.sigmas.double()[(self.timesteps.double() - timestep).abs().argmin()]

    def to_x0(self, x, flow, timestep):
        return (x.double() - self.sigma(timestep) * flow.double()).to(x.dtype)

    def renoise(self, x0, noise, timestep):
        sigma = self.sigma(timestep).float()
        return ((1 - sigma) * x0 + sigma * noise).to(x0.dtype)


class ReferenceMethod:
    """A causal Wan 2.1 DiT with the released Slow-Fast cache, one video, batch 1.

    weights: official names (`blocks.0.self_attn.q.weight`, ...), cast to `dtype` on `device`      grid: token rows and
    columns of a latent frame.  ConfigError for a policy other than `slow_fast` and `uniform`.
    """

    def __init__(
        self,
        weights,
        model: ModelConfig,
        memory: MemoryConfig,
        sampler: SamplerConfig,
        grid,
        dtype=torch.float32,
        device="cpu",
    ):
        if memory.policy not in ("slow_fast", "uniform"):
            raise ConfigError(f"reference_method knows no policy {memory.policy!r}; use 'slow_fast' or 'uniform'")
        self.model, self.memory, self.grid, self.dtype, self.device = model, memory, tuple(grid), dtype, device
        self.weights = {name: tensor.detach().to(device, dtype) for name, tensor in weights.items()}
        self.schedule = Schedule(sampler)
        self.table = [table.to(device) for table in rope_table(model.head_dim, model.theta)]
        self.page_tokens = grid[0] * grid[1]
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new video."""
        shape = (self.memory.slots * self.page_tokens, self.model.heads, self.model.head_dim)
        self.layers = [
            LayerCache(
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                torch.zeros(1, dtype=torch.long, device=self.device),
                torch.zeros(1, dtype=torch.long, device=self.device),
                [-1] * self.memory.slots,
            )
            for _ in range(self.model.layers)
        ]

    def copy_state(self, other: ReferenceMethod) -> None:
        """Take over the caches of another run of the same video, cast to this run's type."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name, value in vars(copy.deepcopy(theirs)).items():
                setattr(mine, name, value)
            mine.k, mine.v, mine.last_key = (t.to(self.dtype) for t in (mine.k, mine.v, mine.last_key))
            mine.cross = tuple(t.to(self.dtype) for t in mine.cross)

    def watched(self) -> ReferenceMethod:
        """A twin over copies of the caches whose RANGES show up by name in torch.profiler."""
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers)
        for name in RANGES:
            setattr(twin, name, torch.profiler.record_function(name)(getattr(twin, name)))
        return twin

    def chunk(self, noise, renoise, prompt, start, trace=None):
        """Denoise one chunk, then run its clean pass.

        noise: (frames, channels, height, width)      renoise: (steps - 1, ...same)
        prompt: (n, text_dim), n <= text_len      start: first latent frame
        trace: list that receives (flow, x0) of every pass      -> latents like noise
        """
        x, warped = noise.to(self.device, self.dtype), self.schedule.warped
        for index, timestep in enumerate(warped):
            flow = self.forward(x, timestep, prompt, start)
            x0 = self.schedule.to_x0(x, flow, timestep)
            if trace is not None:
                trace.append((flow, x0))
            if index + 1 < len(warped):
                x = self.schedule.renoise(x0, renoise[index].to(self.device, self.dtype), warped[index + 1])
        flow = self.forward(x0, 0.0, prompt, start)
        if trace is not None:
            trace.append((flow, self.schedule.to_x0(x0, flow, 0.0)))
        return x0

    def forward(self, latents, timestep, prompt, start):
        """One pass of the DiT.  latents: (frames, channels, height, width) -> flow of the same shape."""
        _, ph, pw = self.model.patch
        weight = self.weights["patch_embedding.weight"].squeeze(2)
        x = F.conv2d(latents, weight, self.weights["patch_embedding.bias"], stride=(ph, pw)).flatten(2).transpose(1, 2)
        frames = x.shape[0]
        x = x.flatten(0, 1)
        embedding, modulation = self.time(timestep, frames)
        context = self.text(prompt)
        for index, cache in enumerate(self.layers):
            x = self.block(f"blocks.{index}.", x, modulation, context, cache, start, frames)
        shift, scale = (self.weights["head.modulation"] + embedding[:, None]).unbind(1)
        x = self.linear("head.head", self.modulate(x, shift, scale))
        rows, columns = self.grid
        x = x.view(frames, rows, columns, ph, pw, self.model.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(frames, -1, rows * ph, columns * pw)

    def linear(self, name, x):
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def modulate(self, x, shift, scale):
        """layer_norm(x) * (1 + scale) + shift, one shift and scale (frames, dim) per latent frame."""
        normed = layer_norm(x, self.model.eps).unflatten(0, (shift.shape[0], -1))
        return (normed * (1 + scale[:, None]) + shift[:, None]).flatten(0, 1)

    def time(self, timestep, frames):
        """Embedding (frames, dim) and block modulation (frames, 6, dim) of one timestep, repeated per latent frame."""
        half = self.model.freq_dim // 2
        angle = timestep * torch.pow(10000.0, -torch.arange(half, dtype=torch.float64) / half)
        wave = torch.cat([angle.cos(), angle.sin()]).to(self.device, self.dtype).expand(frames, -1)
        embedding = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", wave)))
        return embedding, self.linear("time_projection.1", F.silu(embedding)).unflatten(1, (6, -1))

    def text(self, prompt):
        """Pad to text_len with zero rows, then the text MLP: (text_len, dim), on every pass."""
        padded = F.pad(prompt.to(self.device, self.dtype), (0, 0, 0, self.model.text_len - prompt.shape[0]))
        return self.linear("text_embedding.2", F.gelu(self.linear("text_embedding.0", padded), approximate="tanh"))

    def block(self, name, x, modulation, context, cache, start, frames):
        e = (self.weights[name + "modulation"] + modulation).unbind(1)
        y = self.self_attention(name + "self_attn.", self.modulate(x, e[0], e[1]), cache, start, frames)
        x = x + (y.unflatten(0, (frames, -1)) * e[2][:, None]).flatten(0, 1)
        normed = layer_norm(x, self.model.eps, self.weights[name + "norm3.weight"], self.weights[name + "norm3.bias"])
        x = x + self.cross_attention(name + "cross_attn.", normed, context, cache)
        y = F.gelu(self.linear(name + "ffn.0", self.modulate(x, e[3], e[4])), approximate="tanh")
        y = self.linear(name + "ffn.2", y)
        return x + (y.unflatten(0, (frames, -1)) * e[5][:, None]).flatten(0, 1)

    def heads(self, x):
        return x.unflatten(-1, (self.model.heads, -1))

    def cross_attention(self, name, x, context, cache):
        eps, weights = self.model.eps, self.weights
        if cache.cross is None:
            key = rms_norm(self.linear(name + "k", context), weights[name + "norm_k.weight"], eps)
            cache.cross = self.heads(key), self.heads(self.linear(name + "v", context))
        query = rms_norm(self.linear(name + "q", x), weights[name + "norm_q.weight"], eps)
        return self.linear(name + "o", attend(self.heads(query), *cache.cross))

    def self_attention(self, name, x, cache, start, frames):
        eps, weights = self.model.eps, self.weights
        q = self.heads(rms_norm(self.linear(name + "q", x), weights[name + "norm_q.weight"], eps))
        k = rms_norm(self.linear(name + "k", x), weights[name + "norm_k.weight"], eps)
        v = self.heads(self.linear(name + "v", x))
        keyframe = self.is_keyframe(k.mean(0), cache, start)
        k = self.heads(k)
        self.promote(keyframe, k, v, cache, start)
        end = self.store(k, v, cache, start, frames)
        q_positions, k_positions = self.positions(start, frames, end)
        keys = self.rotate(cache.k[: end * self.page_tokens], k_positions)
        return self.linear(name + "o", attend(self.rotate(q, q_positions), keys, cache.v[: end * self.page_tokens]))

    def is_keyframe(self, key_mean, cache, start) -> bool:
        """Whether the mean raw key is unlike that of the previous pass (policy `uniform`: by frame number)."""
        memory, last = self.memory, cache.last_key
        cache.last_key = key_mean
        if memory.policy == "uniform":
            return start >= memory.fast and start % memory.interval == 0
        if start < memory.fast or last is None:
            return False
        return (F.cosine_similarity(key_mean, last, dim=0) < memory.threshold).item()

    def promote(self, keyframe, k, v, cache, start) -> None:
        """Copy the first `keep` frames of the chunk into slow memory: into free slots, else rolled in by cloning."""
        memory, size = self.memory, self.page_tokens
        sink, keep, low, high = memory.sink, memory.keep, memory.sink + cache.promoted, memory.slots - memory.fast
        already = cache.promoted > 0 and cache.sources[low - 1] == start
        cache.action = "none"
        if not keyframe or already or keep < 1:
            return
        if low + keep <= high:
            cache.action = "fill"
            cache.promoted += keep
        elif memory.slow > keep:
            cache.action, low = "roll", high - keep
            for store in (cache.k, cache.v):
                store[sink * size : low * size] = store[(sink + keep) * size : high * size].clone()
            cache.sources[sink:low] = cache.sources[sink + keep : high]
        else:
            return
        cache.k[low * size : (low + keep) * size] = k[: keep * size]
        cache.v[low * size : (low + keep) * size] = v[: keep * size]
        cache.sources[low : low + keep] = range(start, start + keep)

    def store(self, k, v, cache, start, frames) -> int:
        """Write the chunk into the newest fast slots, cloning to shift when full; return the frames in use."""
        slots, size = self.memory.slots, self.page_tokens
        total = (start + frames) * size
        end, seen = cache.end.item(), cache.seen.item()
        if total > seen and end + frames * size > slots * size:
            low = slots - self.memory.fast
            for store in (cache.k, cache.v):
                store[low * size : (slots - frames) * size] = store[(low + frames) * size :].clone()
            cache.sources[low : slots - frames] = cache.sources[low + frames :]
            end -= frames * size
        end += total - seen
        cache.k[end - frames * size : end] = k
        cache.v[end - frames * size : end] = v
        cache.end.fill_(end)
        cache.seen.fill_(total)
        used = end // size
        cache.sources[used - frames : used] = range(start, start + frames)
        return used

    def positions(self, start, frames, end):
        """Temporal positions of the chunk's frames and of slots [0, end), bounded by rope_length."""
        sink = min(self.memory.sink, end)
        anchor = min(start + frames, self.memory.rope_length) - 1
        query = max(0, anchor - frames + 1)
        rest = max(0, anchor - (end - sink) + 1)
        keys = torch.cat([torch.arange(sink), torch.arange(rest, rest + end - sink)])
        return torch.arange(query, query + frames), keys

    def rotate(self, x, positions):
        """Rotate on all axes in complex128.  x: (frames * page_tokens, heads, head_dim)      positions: (frames,)"""
        rows, columns = self.grid
        time, row, column = self.table
        shape = (positions.shape[0], rows, columns, -1)
        turn = torch.cat(
            [
                time[positions][:, None, None].expand(shape),
                row[:rows][None, :, None].expand(shape),
                column[:columns][None, None].expand(shape),
            ],
            dim=-1,
        ).reshape(x.shape[0], 1, -1)
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def chunk_flops(model: ModelConfig, memory: MemoryConfig, page_tokens: int, passes: int = 5) -> dict[str, float]:
    """Multiply-adds times two of a chunk of `reference_method` with a full memory, by kind.

    linear: q, k, v, o, cross q, cross o, FFN, patch and head      attention: chunk x slots
    cross: chunk x text_len      text: the text MLP
    """
    tokens, keys, dim = memory.chunk_frames * page_tokens, memory.slots * page_tokens, model.dim
    patch = math.prod(model.patch)
    ends = patch * (model.in_channels + model.out_channels) * dim
    per_pass = {
        "linear": 2 * tokens * (model.layers * (6 * dim * dim + 2 * dim * model.ffn_dim) + ends),
        "attention": 4 * tokens * keys * dim * model.layers,
        "cross": 4 * tokens * model.text_len * dim * model.layers,
        "text": 2 * model.text_len * (model.text_dim * dim + dim * dim),
    }
    return {kind: float(passes * flops) for kind, flops in per_pass.items()}


if __name__ == "__main__":
    from cfengine.bench.versus import main

    sys.exit(main())
