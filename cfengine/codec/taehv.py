"""TAEHV, the tiny video autoencoder, for Wan 2.1 latents, streaming.

Layout and arithmetic follow `taehv.py` of github.com/madebyollin/taehv (MIT, commit 1f14a56); the weights are its
`taew2_1.pth`, or the same as safetensors. A stack of 3x3 convolutions whose only link in time is a *memory block*: it
sees a frame and the frame before it (zeros before the first). Time is halved and doubled by 1x1 convolutions that
join or split neighbouring frames. So a chunk needs, of all the past, one frame per memory block.

Latents are used as the DiT has them: no mean, no standard deviation. Pixels are in [0, 1].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfengine import checkpoint
from cfengine.codec import check_frames, check_latents, from_pixels, to_levels
from cfengine.errors import CheckpointError

WHAT = "TAEHV weights"
STEM = "taew2_1"
REMEDY = "Take taew2_1.pth of github.com/madebyollin/taehv: other files of that project are for other models"
LATENT_CHANNELS = 16
STRIDE = 4  # video frames a latent
ENCODER_WIDTH = 64
DECODER_WIDTHS = (256, 128, 64, 64)
Memory = dict[int, Tensor]  # layer number -> last frame that it saw, (1, channels, height, width)


def conv3(into: int, out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1, **options)


class SoftClamp(nn.Module):
    """3 tanh(x / 3): latents far outside the usual range are pulled in."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """relu(conv([x, previous x]) + x), three convolutions deep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv3(2 * width, width), nn.ReLU(), conv3(width, width), nn.ReLU(), conv3(width, width)
        )

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, previous], dim=1)) + x)


class JoinFrames(nn.Module):
    """(n * factor, C, h, w) -> (n, C, h, w): neighbouring frames side by side, mixed by a 1x1 convolution."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width * factor, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(0, (-1, self.factor)).flatten(1, 2))


class SplitFrames(nn.Module):
    """(n, C, h, w) -> (n * factor, C, h, w): the inverse of JoinFrames."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.factor, -1)).flatten(0, 1)


class Stack(nn.Sequential):
    """Layers in order; those that remember take and leave one frame in `memory`."""

    def run(self, x: Tensor, memory: Memory) -> Tensor:
        """Apply to consecutive frames (n, C, h, w); `memory` (empty at the start) is updated in place."""
        for i, layer in enumerate(self):
            if isinstance(layer, MemoryBlock):
                first = memory[i] if i in memory else torch.zeros_like(x[:1])
                # a copy: a view would keep the whole chunk's activations alive
                memory[i] = x[-1:].clone()
                x = layer(x, torch.cat([first, x[:-1]]))
            else:
                x = layer(x)
        return x


def build_encoder() -> Stack:
    """Pixels to latents: 3 stages, each halving height and width; the first two halve time too."""
    width = ENCODER_WIDTH
    layers: list[nn.Module] = [conv3(3, width), nn.ReLU()]
    for factor in (2, 2, 1):
        layers += [JoinFrames(width, factor), conv3(width, width, stride=2, bias=False)]
        layers += [MemoryBlock(width) for _ in range(3)]
    return Stack(*layers, conv3(width, LATENT_CHANNELS))


def build_decoder() -> Stack:
    """Latents to pixels: 3 stages, each doubling height and width; the last two double time too."""
    layers: list[nn.Module] = [SoftClamp(), conv3(LATENT_CHANNELS, DECODER_WIDTHS[0]), nn.ReLU()]
    for width, after, factor in zip(DECODER_WIDTHS, DECODER_WIDTHS[1:], (1, 2, 2), strict=False):
        layers += [MemoryBlock(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), SplitFrames(width, factor), conv3(width, after, bias=False)]
    return Stack(*layers, nn.ReLU(), conv3(DECODER_WIDTHS[-1], 3))


class TAEHV(nn.Module):
    """Both halves, under the published names `encoder.N` and `decoder.N`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = build_encoder(), build_decoder()


class TAEHVDecoder:
    """Decoder of one live video.

    A latent makes 4 frames, of which the first latent's first 3 lie before the video and are dropped: latent 0 is
    frame 0, latent i >= 1 frames 4i - 3 to 4i.
    """

    def __init__(self, codec: TAEHVCodec) -> None:
        self._codec = codec
        self.state: Memory = {}

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        codec = self._codec
        check_latents(latents, codec)
        drop = 0 if self.state else STRIDE - 1
        latents = latents.to(codec.device, codec.dtype, memory_format=codec.layout)
        return to_levels(codec.model.decoder.run(latents, self.state)[drop:])

    def decode(self, latents: Tensor) -> np.ndarray:
        return self.draw(latents).cpu().numpy()


class TAEHVEncoder:
    """Encoder of one live video.

    The network makes one latent of 4 whole frames and is trained to look 3 frames ahead of the video VAE's causal
    latents: its latent i is made of frames 4i to 4i + 3. A live encoder does not have those frames yet, so the stream
    is delayed instead: it begins with 3 copies of the first frame. Latents then decode to the video 3 frames late, and
    the last 3 frames given are not visible in them yet.
    """

    def __init__(self, codec: TAEHVCodec) -> None:
        self._codec = codec
        self._memory: Memory = {}
        self._size: tuple[int, int] | None = None

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        codec = self._codec
        check_frames(frames, codec, self._size)
        video = from_pixels(frames, codec.device, codec.dtype)
        if self._size is None:
            video = torch.cat([video[:1].expand(STRIDE - 1, -1, -1, -1), video])
        self._size = frames.shape[1:3]
        return codec.model.encoder.run(video, self._memory)


class TAEHVCodec:
    """TAEHV for Wan 2.1 (interface `cfengine.codec.Codec`)."""

    latent_channels = LATENT_CHANNELS
    spatial_stride = 8
    temporal_stride = STRIDE

    def __init__(self, model: TAEHV) -> None:
        self.model = model.eval().requires_grad_(False)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        # the tensor cores want channels side by side, in weights and pictures
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        if self.device.type == "cuda":
            self.model.to(memory_format=self.layout)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TAEHVCodec:
        """Load `taew2_1` (.safetensors or .pth) from a file, folder or hub id; CheckpointError if it does not fit."""
        path = checkpoint.fetch(source, (f"{STEM}.safetensors", f"{STEM}.pth"), WHAT)
        if path.is_dir():
            found = checkpoint.find(path, (STEM, f"safetensors/{STEM}"))
            if found is None:
                error = checkpoint.nothing_found(path, (f"{STEM}.safetensors", f"{STEM}.pth"), WHAT)
                raise CheckpointError(f"{error}. {REMEDY}")
            path = found
        state = checkpoint.read_tensors(path)
        with torch.device("meta"):
            model = TAEHV()
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        state = {name: _trim(tensor, expected.get(name)) for name, tensor in state.items()}
        checkpoint.check_shapes(state, expected, str(path), REMEDY)
        model.load_state_dict(state, assign=True)
        return cls(model.to(device=device, dtype=dtype))

    def decoder(self) -> TAEHVDecoder:
        return TAEHVDecoder(self)

    def encoder(self) -> TAEHVEncoder:
        return TAEHVEncoder(self)


def _trim(tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Keep the last frame's rows of a SplitFrames weight that was published for more frames than are made here."""
    if shape is None or tensor.ndim != 4 or tensor.shape[2:] != (1, 1) or tensor.shape[1:] != shape[1:]:
        return tensor
    return tensor[-shape[0] :] if tensor.shape[0] > shape[0] else tensor
