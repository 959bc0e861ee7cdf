"""The Wan 2.1 video VAE through diffusers' `AutoencoderKLWan`, streaming.

Every causal convolution of the network keeps the last two frames of its input. diffusers keeps them inside the model
and forgets them at the end of each call; here each stream owns its list, so that chunk after chunk the frames are
those of the whole video. Latents are normalised per channel: DiT latent = (VAE latent - mean) / std.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cfengine import checkpoint
from cfengine.codec import check_frames, check_latents, from_pixels, to_levels
from cfengine.errors import CheckpointError, ConfigError

WHAT = "Wan VAE weights"
OFFICIAL = "Wan2.1_VAE"  # stem of the file in Wan-AI/Wan2.1-T2V-1.3B
DIFFUSERS = "diffusion_pytorch_model"
HUB_FILES = (f"{OFFICIAL}.safetensors", f"{OFFICIAL}.pth", "vae/config.json", f"vae/{DIFFUSERS}*.safetensors*")
REMEDY = "Take Wan2.1_VAE.pth of Wan-AI/Wan2.1-T2V-1.3B, or the vae folder of its diffusers release"
STRIDE = 4
_RESNETS = 3  # a decoder stage of the official file: three residual blocks, then a resampler but for the last stage

_WHOLE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_HALF = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def to_diffusers(name: str) -> str:
    """Translate one name of `Wan2.1_VAE.pth` (`wan/modules/vae.py` of Wan-Video/Wan2.1); unknown names stay."""
    stem, _, kind = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    match = re.fullmatch(r"(encoder|decoder)\.(.+)", stem)
    if not match:
        return name
    half, rest = match.groups()
    if rest in _HALF:
        return f"{half}.{_HALF[rest]}.{kind}"
    match = re.fullmatch(r"(middle|downsamples|upsamples)\.(\d+)\.(.+)", rest)
    if not match:
        return name
    group, number, part = match.groups()
    part = "conv_shortcut" if part == "shortcut" else _RESIDUAL.get(part, part)
    if group == "middle":
        return f"{half}.mid_block.{_MIDDLE.get(number, number)}.{part}.{kind}"
    if group == "downsamples":
        return f"{half}.down_blocks.{number}.{part}.{kind}"
    stage, i = divmod(int(number), _RESNETS + 1)
    place = "upsamplers.0" if i == _RESNETS else f"resnets.{i}"
    return f"{half}.up_blocks.{stage}.{place}.{part}.{kind}"


class WanDecoder:
    """Decoder of one live video: latents go through one by one, as the network was trained."""

    def __init__(self, codec: WanVAECodec) -> None:
        self._codec = codec
        self.state: dict[int, Any] = {}  # place in the network's list -> what it left there

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        codec = self._codec
        check_latents(latents, codec)
        features = codec.empty_features(codec.vae.decoder)
        for place, feature in self.state.items():
            features[place] = feature
        latents = latents.to(codec.device, torch.float32) * codec.std + codec.mean
        video = []
        for latent in latents.to(codec.dtype):
            z = codec.vae.post_quant_conv(latent[None, :, None].contiguous(memory_format=codec.layout))
            video.append(codec.vae.decoder(z, feat_cache=features, feat_idx=[0])[0])
        self.state = {place: feature for place, feature in enumerate(features) if feature is not None}
        return to_levels((torch.cat(video, dim=1).transpose(0, 1).float() + 1) / 2)

    def decode(self, latents: Tensor) -> np.ndarray:
        return self.draw(latents).cpu().numpy()


class WanEncoder:
    """Encoder of one live video: the first frame alone, then groups of four. Latents are the mean, not a sample."""

    def __init__(self, codec: WanVAECodec) -> None:
        self._codec = codec
        self._features = codec.empty_features(codec.vae.encoder)
        self._size: tuple[int, int] | None = None

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        codec = self._codec
        check_frames(frames, codec, self._size)
        video = from_pixels(frames, codec.device, torch.float32).mul(2).sub(1).to(codec.dtype).transpose(0, 1)
        head = 1 if self._size is None else 0
        groups = [video[:, :1]] * head + list(video[:, head:].split(STRIDE, dim=1) if video.shape[1] > head else ())
        self._size = frames.shape[1:3]
        latents = []
        for group in groups:
            features = codec.vae.encoder(group[None], feat_cache=self._features, feat_idx=[0])
            latents.append(codec.vae.quant_conv(features)[0, : codec.latent_channels])
        return (torch.cat(latents, dim=1).transpose(0, 1).float() - codec.mean) / codec.std


class WanVAECodec:
    """The Wan 2.1 VAE (interface `cfengine.codec.Codec`); `vae` is an `AutoencoderKLWan`."""

    spatial_stride = 8
    temporal_stride = STRIDE

    def __init__(self, vae: Any) -> None:
        self.vae: Any = vae.eval().requires_grad_(False)
        weight = next(vae.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        # the tensor cores want channels side by side, in weights and pictures
        self.layout = torch.channels_last_3d if self.device.type == "cuda" else torch.contiguous_format
        if self.device.type == "cuda":
            for module in vae.modules():
                if isinstance(module, nn.Conv2d | nn.Conv3d):
                    flat = isinstance(module, nn.Conv2d)
                    module.to(memory_format=torch.channels_last if flat else self.layout)
        self.latent_channels: int = vae.config.z_dim
        sizes = {"latents_mean": len(vae.config.latents_mean), "latents_std": len(vae.config.latents_std)}
        for name, size in sizes.items():
            if size != self.latent_channels:
                raise ConfigError(
                    f"{name} has {size} values for {self.latent_channels} latent channels; fix the VAE's config.json"
                )
        self.mean = torch.tensor(vae.config.latents_mean, device=self.device)[:, None, None]
        self.std = torch.tensor(vae.config.latents_std, device=self.device)[:, None, None]

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> WanVAECodec:
        """Load the official file or the diffusers folder from a file, folder or hub id.

        Raises CheckpointError for what is missing or does not fit, ConfigError where diffusers is not installed.
        """
        path = _file_in(checkpoint.fetch(source, HUB_FILES, WHAT))
        state = checkpoint.read_tensors(path)
        if "encoder.conv1.weight" in state:
            state = {to_diffusers(name): tensor for name, tensor in state.items()}
        vae = _empty_vae(_options(path, state))
        expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
        checkpoint.check_shapes(state, expected, str(path), REMEDY)
        vae.load_state_dict(state, assign=True)
        return cls(vae.to(device=device, dtype=dtype))

    def empty_features(self, half: nn.Module) -> list[Any]:
        """Make the feature list of a new stream: one place a convolution, which the network fills in order."""
        return [None] * sum(isinstance(module, nn.Conv3d) for module in half.modules())

    def decoder(self) -> WanDecoder:
        return WanDecoder(self)

    def encoder(self) -> WanEncoder:
        return WanEncoder(self)


def _file_in(found: Path) -> Path:
    if found.is_file():
        return found
    path = checkpoint.find(found, (OFFICIAL, f"vae/{DIFFUSERS}", DIFFUSERS))
    if path is None:
        wanted = (f"{OFFICIAL}.pth", f"vae/{DIFFUSERS}.safetensors", f"{DIFFUSERS}.safetensors")
        raise checkpoint.nothing_found(found, wanted, WHAT)
    return path


def _options(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the constructor's arguments: the config.json beside diffusers weights, else the sizes in the shapes."""
    config = path.parent / "config.json"
    if path.stem.startswith(DIFFUSERS) and config.is_file():
        options = checkpoint.read_json(config)
        if options.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
            raise CheckpointError(
                f"{config} describes a {options['_class_name']} and not an AutoencoderKLWan. {REMEDY}"
            )
        if options.get("is_residual") or options.get("patch_size"):
            raise CheckpointError(
                f"{config} describes a Wan 2.2 VAE (stride 16); the DiT here takes Wan 2.1 latents. {REMEDY}"
            )
        return options
    first, last = state.get("encoder.conv_in.weight"), state.get("post_quant_conv.weight")
    if first is None or last is None:
        raise CheckpointError(f"{path} lacks encoder and post_quant_conv weights; it is no Wan VAE. {REMEDY}")
    return {"base_dim": first.shape[0], "z_dim": last.shape[0]}


def _empty_vae(options: Mapping[str, Any]) -> nn.Module:
    """Build AutoencoderKLWan without memory for its weights."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise ConfigError("the Wan VAE needs diffusers; pip install 'cfengine[wan]', or use the codec taehv") from error
    try:
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(dict(options))
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"the VAE's config.json is not usable ({error}); fetch it again") from error
