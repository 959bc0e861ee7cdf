"""Decoders as graphs: latents and the past go in, pixels and the next past come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cfengine.codec import Codec
from cfengine.config import EngineConfig
from cfengine.errors import ConfigError
from cfengine.export.parts import Part, Port, weights_of


class TinyWorldDecoder(nn.Module):
    """`codec.tiny_world.StreamDecoder.draw`; past: the latent before, at the start of a stream the first one itself.

    A stream's first latent gives one frame, the last of the four that the graph makes of it.
    """

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self.decoder = codec.decoder_net

    def forward(self, latents: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        video = self.decoder(torch.cat([past, latents[:-1]]), latents).flatten(0, 1)
        return (video + 1) / 2, latents[-1:].clone()


class TAEHVDecoder(nn.Module):
    """`codec.taehv.TAEHVDecoder.draw`; past: a frame a memory block, zeros at the start, where 3 frames are dropped."""

    def __init__(self, codec: Any, places: list[int]) -> None:
        super().__init__()
        self.decoder, self._places = codec.model.decoder, places

    def forward(self, latents: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        memory = dict(zip(self._places, past, strict=True))
        video = self.decoder.run(latents, memory)
        return video, *(memory[place] for place in self._places)


class WanDecoder(nn.Module):
    """`codec.wan_vae.WanDecoder.draw` of one latent; past: two frames before each causal convolution.

    diffusers starts with shorter pasts, and pads them with zeros when it convolves; here they are padded when they
    are kept, which gives the same sums and the same shapes from the first latent on. A past that diffusers only marks
    ("Rep") is all zeros: it is no output of the start.
    """

    def __init__(self, codec: Any, places: list[int]) -> None:
        super().__init__()
        vae = codec.vae
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.register_buffer("latents_mean", codec.mean)
        self.register_buffer("latents_std", codec.std)
        self._places, self._size = places, len(codec.empty_features(vae.decoder))

    def forward(self, latents: Tensor, past: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        features: list[Any] = [None] * self._size
        for place, feature in zip(self._places, past, strict=False):
            features[place] = feature
        dtype = self.post_quant_conv.weight.dtype
        wide = latents.float() * self.latents_std.float() + self.latents_mean.float()
        z = self.post_quant_conv(wide.to(dtype).transpose(0, 1)[None])
        video = self.decoder(z, feat_cache=features, feat_idx=[0])[0]
        kept = [features[place] for place in self._places if torch.is_tensor(features[place])]
        return ((video.transpose(0, 1) + 1) / 2, *(_two_frames(feature) for feature in kept))


def _two_frames(feature: Tensor) -> Tensor:
    """(1, C, 1 or 2, h, w) -> (1, C, 2, h, w): zeros before a single frame."""
    return feature if feature.shape[2] == 2 else torch.cat([torch.zeros_like(feature), feature], dim=2)


def decoder_parts(config: EngineConfig, codec: Codec, dtype: torch.dtype) -> list[Part]:
    """Graphs of a codec's decoder, for chunks of the configured size.

    Pixels are (frames, 3, H, W) in 0..1 and not clamped.
    """
    parts = {"tiny_world": _tiny_world, "taehv": _taehv, "wan_vae": _wan_vae}
    if config.codec not in parts:
        raise ConfigError(f"codec {config.codec!r} has no exported decoder; choose one of {', '.join(parts)}")
    return parts[config.codec](config, codec, dtype)


def _tiny_world(config: EngineConfig, codec: Codec, dtype: torch.dtype) -> list[Part]:
    frames, latent = config.memory.chunk_frames, _latent(config, codec)
    module = TinyWorldDecoder(codec)
    return [
        Part(
            "decoder",
            module,
            {"latents": Port(dtype, (frames, *latent)), "past_0": Port(dtype, (1, *latent))},
            {"video": _video(config, dtype, frames * codec.temporal_stride), "next_0": Port(dtype, (1, *latent))},
            (lambda: weights_of(module, dtype),),
        )
    ]


def _taehv(config: EngineConfig, codec: Any, dtype: torch.dtype) -> list[Part]:
    frames, latent = config.memory.chunk_frames, _latent(config, codec)
    memory: dict[int, Tensor] = {}
    _shapes_of(codec.model.decoder, lambda net: net.run(_empty(codec, frames, latent), memory))
    places = sorted(memory)
    module = TAEHVDecoder(codec, places)
    past = {place: Port(dtype, tuple(memory[place].shape)) for place in places}
    return [
        Part(
            "decoder",
            _Flat(module),
            {"latents": Port(dtype, (frames, *latent))} | {f"past_{place}": port for place, port in past.items()},
            {"video": _video(config, dtype, frames * codec.temporal_stride)}
            | {f"next_{place}": port for place, port in past.items()},
            (lambda: weights_of(_Flat(module), dtype),),
        )
    ]


def _wan_vae(config: EngineConfig, codec: Any, dtype: torch.dtype) -> list[Part]:
    latent, places = _latent(config, codec), list(range(len(codec.empty_features(codec.vae.decoder))))
    features: list[Any] = [None] * len(places)
    marked: list[bool] = []

    def two_latents(net: nn.Module) -> None:
        z = _empty(codec, 1, latent).transpose(0, 1)[None]
        net(z, feat_cache=features, feat_idx=[0])
        marked.extend(isinstance(feature, str) for feature in features)
        net(z, feat_cache=features, feat_idx=[0])

    _shapes_of(codec.vae.decoder, two_latents)
    used = [place for place in places if torch.is_tensor(features[place])]
    past = {place: Port(dtype, (1, features[place].shape[1], 2, *features[place].shape[3:])) for place in used}
    module = _Flat(WanDecoder(codec, used))
    one = {"latents": Port(dtype, (1, *latent))}
    weights = (lambda: weights_of(module, dtype),)

    def outputs(frames: int, kept: list[int]) -> dict[str, Port]:
        return {"video": _video(config, dtype, frames)} | {f"next_{place}": past[place] for place in kept}

    fresh = [place for place in used if not marked[place]]
    return [
        Part("decoder_start", module, one, outputs(1, fresh), weights, "decoder"),
        Part(
            "decoder",
            module,
            one | {f"past_{place}": port for place, port in past.items()},
            outputs(codec.temporal_stride, used),
            weights,
        ),
    ]


class _Flat(nn.Module):
    """A decoder with its past as operands one by one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        return self.module(latents, past)


def _latent(config: EngineConfig, codec: Codec) -> tuple[int, int, int]:
    return codec.latent_channels, config.video.latent_height, config.video.latent_width


def _video(config: EngineConfig, dtype: torch.dtype, frames: int) -> Port:
    return Port(dtype, (frames, 3, config.video.height, config.video.width))


def _empty(codec: Any, frames: int, latent: tuple[int, int, int]) -> Tensor:
    return torch.zeros(frames, *latent, dtype=codec.dtype, device="meta")


def _shapes_of(net: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Run a network for the shapes of what it keeps alone: on a copy without memory."""
    import copy

    with torch.no_grad():
        run(copy.deepcopy(net).to("meta"))
