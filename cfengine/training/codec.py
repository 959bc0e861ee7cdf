"""Training of the small world's codec: reconstruct four frames from two noisy latent frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cfengine.codec.tiny_world import SPACE, PairDecoder, PatchEncoder, TinyWorldCodec
from cfengine.training import world
from cfengine.training.optimiser import Both, schedule
from cfengine.training.settings import Descent

NOISE = 0.12  # largest size of the noise on unit-variance latents
REFINING_NOISE = 0.1
ALIGNED = 0.8  # share of cameras that start on an edge of a latent column, as those of sessions do


def panoramas(count: int, seed: int) -> torch.Tensor:
    """Draw whole turns of random scenes -> (count, HEIGHT, TURN, 3) uint8."""
    rng = np.random.default_rng(seed)
    x = np.arange(world.TURN) + 0.5
    drawn = [
        np.rint(world.render_columns(world.random_scene(rng), x)).clip(0, 255).astype(np.uint8) for _ in range(count)
    ]
    return torch.from_numpy(np.stack(drawn))


def views(turns: torch.Tensor, scene: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Cut camera views out of panoramas: scene (n,), left (n, f) in pixels -> (n, f, 3, HEIGHT, WIDTH), -1..1."""
    columns = (left[..., None] + torch.arange(world.WIDTH)) % turns.shape[2]
    cut = turns[scene[:, None, None], :, columns]  # (n, f, WIDTH, HEIGHT, 3)
    return cut.permute(0, 1, 4, 3, 2).float() / 127.5 - 1


def codec_batch(turns: torch.Tensor, size: int, draw: torch.Generator) -> torch.Tensor:
    """Five consecutive frames of cameras turning steadily -> (size, 5, 3, HEIGHT, WIDTH).

    Most turn at the world's rates, some at others; one in thirty shows a cut: the first frame is of another scene.
    """
    scene = torch.randint(len(turns), (size,), generator=draw)
    usual = torch.tensor([0, 2, -2])[torch.randint(3, (size,), generator=draw)]
    other = torch.randint(-3, 4, (size,), generator=draw)
    step = torch.where(torch.rand(size, generator=draw) < 0.9, usual, other)
    start = torch.randint(turns.shape[2], (size, 1), generator=draw)
    aligned = torch.rand(size, 1, generator=draw) < ALIGNED
    start = torch.where(aligned, start // SPACE * SPACE, start)
    frames = views(turns, scene, start + step[:, None] * torch.arange(5))
    cut = (torch.rand(size, generator=draw) < 1 / 30).nonzero()[:, 0]
    if len(cut):
        frames[cut, 0] = views(turns, scene[cut] - 1, start[cut])[:, 0]
    return frames


def codec_loss(codec: TinyWorldCodec, frames: torch.Tensor, noise: float, draw: torch.Generator) -> torch.Tensor:
    """L1 of pixels and of their differences, after noise of a random size up to `noise` on unit-variance latents."""
    size = len(frames)
    latents = codec.encoder_net(torch.cat([frames[:, 0], frames[:, 4]]))
    amount = noise * torch.rand(size, 1, 1, 1, generator=draw).repeat(2, 1, 1, 1)
    latents = latents + amount * torch.randn(latents.shape, generator=draw)
    drawn = codec.decoder_net(latents[:size], latents[size:]).float()
    truth = frames[:, 1:]
    error = F.l1_loss(drawn, truth)
    for axis in (-1, -2):
        error = error + F.l1_loss(drawn.diff(dim=axis), truth.diff(dim=axis))
    return error


@torch.no_grad()
def settle_norm(codec: TinyWorldCodec, turns: torch.Tensor, draw: torch.Generator) -> None:
    """Replace the running mean and variance of the latents by those of 480 views."""
    codec.encoder_net.eval()
    norm = codec.encoder_net.norm
    frames = torch.cat([codec_batch(turns, 24, draw)[:, 4] for _ in range(20)])
    latents = codec.encoder_net(frames).movedim(1, -1).flatten(0, 2)
    raw = latents * (norm.running_var + norm.eps).sqrt() + norm.running_mean
    norm.running_mean.copy_(raw.mean(0))
    norm.running_var.copy_(raw.var(0))


def optimiser_of(nets: torch.nn.Module, codec: TinyWorldCodec) -> Both:
    """Muon inside, AdamW for biases and for the layers that touch latents or pixels last."""
    edges = {id(p) for p in (codec.decoder_net.leave.weight, codec.encoder_net.net[4].weight)}
    matrices = [p for p in nets.parameters() if p.dim() > 1 and id(p) not in edges]
    return Both(matrices, [p for p in nets.parameters() if p.dim() == 1 or id(p) in edges])


def train_codec(
    out: Path, seed: int, steps: int, report: Callable[[str, dict], None], scenes: int = 400, batch: int = 24
) -> TinyWorldCodec:
    """Train for `steps` steps (or load `out` where it exists) and write the codec there."""
    if out.exists():
        return TinyWorldCodec.from_file(out)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    turns = panoramas(scenes, seed + 1)
    codec = TinyWorldCodec(PatchEncoder(), PairDecoder())
    nets = torch.nn.ModuleList([codec.encoder_net, codec.decoder_net]).train().to(memory_format=torch.channels_last)
    optimiser, kept, begin = optimiser_of(nets, codec), out.with_suffix(".state"), 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        nets.load_state_dict(state["nets"])
        optimiser.load_state_dict(state["optimiser"])
        draw.set_state(state["draw"])
        begin = state["step"]
    descent = Descent(steps, 3e-3, warm=40)
    for step in range(begin, steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = codec_loss(codec, codec_batch(turns, batch, draw), NOISE, draw)
        loss.backward()
        optimiser.step(schedule(step, descent))
        if step % 25 == 0:
            report("codec", {"step": step, "of": steps, "loss": loss.item()})
        if step % 100 == 99:
            state = {
                "nets": nets.state_dict(),
                "optimiser": optimiser.state_dict(),
                "draw": draw.get_state(),
                "step": step + 1,
            }
            torch.save(state, kept)
    settle_norm(codec, turns, draw)
    codec.save(out)
    return TinyWorldCodec.from_file(out)


def refine_decoder(
    codec: TinyWorldCodec, out: Path, seed: int, steps: int, report: Callable[[str, dict], None], batch: int = 24
) -> TinyWorldCodec:
    """Train the decoder alone for `steps` more steps (or load `out`); latents stay what they are."""
    if out.exists():
        return TinyWorldCodec.from_file(out)
    draw = torch.Generator().manual_seed(seed)
    turns = panoramas(400, seed)
    codec.encoder_net.requires_grad_(False).eval()
    net = codec.decoder_net.train().to(memory_format=torch.channels_last)
    optimiser, descent = optimiser_of(net, codec), Descent(steps, 2e-3, warm=40)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = codec_loss(codec, codec_batch(turns, batch, draw), REFINING_NOISE, draw)
        loss.backward()
        optimiser.step(schedule(step, descent))
        if step % 25 == 0:
            report("decoder", {"step": step, "of": steps, "loss": loss.item()})
    codec.save(out)
    return TinyWorldCodec.from_file(out)
