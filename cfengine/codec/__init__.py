"""Codecs: latents to pixels and back, one chunk at a time; every live video has its own decoder and encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.errors import ConfigError


class StreamDecoder(Protocol):
    """Decoder of one live video; it keeps what the next chunk needs of the past.

    state: that past, a tensor a place in the network; empty before the first latent. It may be replaced by one of equal
    shapes, as a captured graph does that keeps it in place.
    """

    state: dict[int, Any]

    def draw(self, latents: Tensor) -> Tensor:
        """Decode the next latents of the stream, without a word to the host.

        latents: (n, C, h, w) as the DiT emits them  ->  (frames, H, W, 3) uint8 RGB, where the weights are
        The first latent of a stream gives 1 frame, each later one `temporal_stride`.
        """
        ...

    def decode(self, latents: Tensor) -> np.ndarray:
        """`draw`, in host memory."""
        ...


class StreamEncoder(Protocol):
    """Encoder of one live video."""

    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode the next frames of the stream.

        frames: (m, H, W, 3) uint8 RGB; m = 1 + k * temporal_stride in the first call, k * temporal_stride later
        ->  (n, C, h, w) latents as the DiT takes them: n = 1 + k, then k.  Another m raises ConfigError.
        """
        ...


class Codec(Protocol):
    """A pair of networks between pixels and latents, shared by all streams."""

    latent_channels: int
    spatial_stride: int
    temporal_stride: int

    def decoder(self) -> StreamDecoder:
        """Open a decoder at the start of a stream."""
        ...

    def encoder(self) -> StreamEncoder:
        """Open an encoder at the start of a stream."""
        ...


def load_codec(
    config: EngineConfig,
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Codec:
    """Load the codec that `config.codec` names from `source` (file, folder or hub id) and hold it against `config`.

    Raises ConfigError for an unknown codec or sizes that do not fit, CheckpointError for weights that do not.
    """
    if config.codec == "tiny_world":
        from cfengine.codec.tiny_world import TinyWorldCodec

        codec: Codec = TinyWorldCodec.from_file(Path(source), device)
    elif config.codec == "wan_vae":
        from cfengine.codec.wan_vae import WanVAECodec

        codec = WanVAECodec.from_pretrained(source, device=device, dtype=dtype)
    elif config.codec == "taehv":
        from cfengine.codec.taehv import TAEHVCodec

        codec = TAEHVCodec.from_pretrained(source, device=device, dtype=dtype)
    else:
        raise ConfigError(f"unknown codec {config.codec!r}; choose one of tiny_world, wan_vae, taehv")
    pairs = (
        ("latent channels", codec.latent_channels, "ModelConfig.out_channels", config.model.out_channels),
        ("spatial stride", codec.spatial_stride, "VideoConfig.spatial_stride", config.video.spatial_stride),
        ("temporal stride", codec.temporal_stride, "VideoConfig.temporal_stride", config.video.temporal_stride),
    )
    for what, has, name, wants in pairs:
        if has != wants:
            raise ConfigError(
                f"codec {config.codec} has {what} {has} but {name} is {wants}; choose codec and model that match"
            )
    return codec


def check_latents(latents: Tensor, codec: Codec) -> None:
    """Raise ConfigError unless `latents` is (n, latent_channels, h, w) with n >= 1."""
    if latents.ndim != 4 or latents.shape[0] < 1 or latents.shape[1] != codec.latent_channels:
        raise ConfigError(
            f"latents are {tuple(latents.shape)}; the decoder takes (frames, {codec.latent_channels}, height, width) "
            "with at least 1 frame"
        )


def check_frames(frames: np.ndarray, codec: Codec, size: tuple[int, int] | None) -> None:
    """Raise ConfigError unless `frames` may come next: `size` is (H, W) of the stream, None before its first call."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ConfigError(
            f"frames are {frames.dtype} {frames.shape}; the encoder takes uint8 (frames, height, width, 3)"
        )
    count, height, width = frames.shape[:3]
    unit, step = codec.spatial_stride, codec.temporal_stride
    if height % unit or width % unit or not height or not width:
        raise ConfigError(f"frames of {width}x{height} do not divide by the codec's stride {unit}; resize or crop them")
    if size is not None and (height, width) != size:
        raise ConfigError(
            f"frames are {width}x{height} but the stream began with {size[1]}x{size[0]}; open a new encoder"
        )
    if size is None and count % step != 1:
        raise ConfigError(f"the first call got {count} frames; it takes 1 + a multiple of {step}, such as {step + 1}")
    if size is not None and (count < 1 or count % step):
        raise ConfigError(f"a later call got {count} frames; it takes a multiple of {step}, such as {step}")


def to_levels(video: Tensor) -> Tensor:
    """(frames, 3, H, W) in [0, 1], clamped and rounded -> (frames, H, W, 3) uint8"""
    levels = video.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def from_pixels(frames: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(frames, H, W, 3) uint8 -> (frames, 3, H, W) in [0, 1]"""
    levels = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
    return levels.permute(0, 3, 1, 2).to(torch.float32).div(255).to(dtype)
