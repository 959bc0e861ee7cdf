"""Codec of the small world: 8x8 in space, 4x in time, 16 channels, streaming both ways.

A latent frame is the appearance of the last of its four video frames, patch by patch, so that a shift of the image by
8 pixels is a shift of the latent by one column and nothing else. The decoder sees the latent frame before it too and
draws the three video frames in between. The first latent frame of a stream stands for one video frame.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cfengine.errors import CheckpointError, ConfigError

CHANNELS, SPACE, TIME = 16, 8, 4


class PatchEncoder(nn.Module):
    """Maps every 8x8 patch of a frame to 16 numbers of zero mean and unit variance, with no sight of its neighbours."""

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3 * SPACE * SPACE, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, CHANNELS),
        )
        self.norm = nn.BatchNorm1d(CHANNELS, affine=False, momentum=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) in -1..1 -> (n, 16, H / 8, W / 8)."""
        n, _, height, width = images.shape
        patches = F.pixel_unshuffle(images, SPACE).permute(0, 2, 3, 1).flatten(0, 2)
        latents = self.norm(self.net(patches).float())
        return latents.view(n, height // SPACE, width // SPACE, CHANNELS).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """x + conv(gelu(conv(gelu(x)))), 3x3 each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, width, h, w) -> the same shape."""
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class PairDecoder(nn.Module):
    """Draws four video frames from a latent frame and the one before it; all work is done at 1/8 and 1/4 resolution."""

    def __init__(self, low: int = 128, high: int = 64) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2 * CHANNELS, low, 3, padding=1)
        self.low = nn.Sequential(Residual(low), Residual(low))
        self.up = nn.Conv2d(low, 4 * high, 1)
        self.high = nn.Sequential(Residual(high), Residual(high))
        self.leave = nn.Conv2d(high, TIME * 3 * 16, 3, padding=1)

    def forward(self, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """(n, 16, h, w) twice -> (n, 4, 3, 8 h, 8 w) in -1..1 (not clamped)."""
        x = self.low(self.enter(torch.cat([before, now], dim=1)))
        x = self.high(F.pixel_shuffle(self.up(x), 2))
        return F.pixel_shuffle(self.leave(x), 4).unflatten(1, (TIME, 3))


class StreamDecoder:
    """Latents to video frames, chunk by chunk; keeps the last latent frame between calls."""

    def __init__(self, net: PairDecoder) -> None:
        self._net = net
        self.state: dict[int, torch.Tensor] = {}  # at 0 the last latent frame, once there is one

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """`draw`, in host memory."""
        return self.draw(latents).cpu().numpy()

    @torch.inference_mode()
    def draw(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, 16, h, w) -> (frames, 8 h, 8 w, 3) uint8; 4 frames each, 1 for the first latent frame of the stream.

        Latent frames are decoded one at a time, so that any split into calls gives the same bytes.
        """
        if latents.dim() != 4 or latents.shape[1] != CHANNELS:
            raise ConfigError(
                f"latents have shape {tuple(latents.shape)}; this codec takes (frames, {CHANNELS}, rows, columns)"
            )
        weight = self._net.enter.weight
        pieces = []
        for latent in latents.to(weight.device, weight.dtype).split(1):
            frames = self._net(self.state.get(0, latent), latent)[0]
            pieces.append(frames if self.state else frames[-1:])
            self.state = {0: latent}
        if not pieces:
            return latents.new_zeros((0, SPACE * latents.shape[2], SPACE * latents.shape[3], 3), dtype=torch.uint8)
        video = torch.cat(pieces).permute(0, 2, 3, 1)
        return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


class StreamEncoder:
    """Video frames to latents, chunk by chunk; remembers only whether the stream has begun."""

    def __init__(self, net: PatchEncoder) -> None:
        self._net = net
        self._begun = False

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """(m, H, W, 3) uint8 -> (n, 16, H / 8, W / 8) float32; m = 1 + 4 k in the first call, 4 k afterwards."""
        lead = 0 if self._begun else 1
        m, height, width = frames.shape[:3]
        if m < lead or (m - lead) % TIME:
            rule = f"1 + a multiple of {TIME}" if lead else f"a multiple of {TIME}"
            raise ConfigError(f"{m} video frames given but this call takes {rule}; pass whole groups of frames")
        if height % SPACE or width % SPACE:
            raise ConfigError(
                f"frames are {width}x{height} but both sides must be multiples of {SPACE}; crop or resize them"
            )
        self._begun = True
        kept = frames[0::TIME] if lead else frames[TIME - 1 :: TIME]
        weight = self._net.net[0].weight
        images = torch.from_numpy(np.ascontiguousarray(kept)).to(weight.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        pieces = [self._net(image) for image in images.split(1)]
        return torch.cat(pieces) if pieces else images.new_zeros(0, CHANNELS, height // SPACE, width // SPACE)


class TinyWorldCodec:
    """Encoder and decoder of the small world, with the interface that every codec shares."""

    latent_channels, spatial_stride, temporal_stride = CHANNELS, SPACE, TIME

    def __init__(self, encoder: PatchEncoder | None = None, decoder: PairDecoder | None = None) -> None:
        self.encoder_net = (encoder or PatchEncoder()).eval()
        self.decoder_net = (decoder or PairDecoder()).eval()

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu") -> TinyWorldCodec:
        """Load weights written by `save`; CheckpointError where the file is missing, damaged or of another codec."""
        codec = cls()
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(
                f"codec file {path} cannot be read ({problem}); download or train it again"
            ) from problem
        for name, module in (("encoder", codec.encoder_net), ("decoder", codec.decoder_net)):
            own = {k.removeprefix(f"{name}."): v.float() for k, v in tensors.items() if k.startswith(f"{name}.")}
            wanted = {k: v.shape for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
            wrong = sorted(k for k in wanted.keys() | own.keys() if k not in own or own[k].shape != wanted.get(k))
            if wrong:
                raise CheckpointError(
                    f"codec file {path}: {len(wrong)} {name} tensors missing, extra or mis-shaped: {', '.join(wrong)}"
                )
            module.load_state_dict(own, strict=False)
            module.to(device).eval()
        return codec

    def save(self, path: str | Path) -> None:
        """Write both nets as float16 safetensors."""
        tensors = {f"encoder.{k}": v for k, v in self.encoder_net.state_dict().items()}
        tensors |= {f"decoder.{k}": v for k, v in self.decoder_net.state_dict().items()}
        kept = {k: v.half().contiguous() for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
        save_file(kept, path, metadata={"format": "cfengine tiny-world codec"})

    def encoder(self) -> StreamEncoder:
        """Begin a stream of video frames."""
        return StreamEncoder(self.encoder_net)

    def decoder(self) -> StreamDecoder:
        """Begin a stream of latents."""
        return StreamDecoder(self.decoder_net)
