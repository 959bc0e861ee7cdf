"""Flow matching under the Slow-Fast memory, with contexts that carry the model's own errors.

x_t = (1 - s) x0 + s eps, target v = eps - x0, timestep 1000 s. Most noise levels are the four of the released
model's sampler, the rest follow its warped schedule. From a fifth of the training on, errors are recycled (see
`cfengine.training.recycle`), and every batch serves several times: the second time and later, what the model made of
its chunks before can be their context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig, SamplerConfig
from cfengine.training.coupling import couple
from cfengine.training.data import Batch, Source
from cfengine.training.forward import flow_from, remember
from cfengine.training.parallel import draws, rank
from cfengine.training.place import device_of, mixed, number
from cfengine.training.recycle import ErrorBank, corrupt
from cfengine.training.seen import shown_in
from cfengine.training.settings import Length, Teacher
from cfengine.training.state import Progress, World

TAUGHT = SamplerConfig()  # the schedule whose levels the teacher sees most; a student may walk another one
COPIES = 2  # noisy copies of every chunk in a step
PLAIN = 0.3  # share of the training after which coupled noise is normal
RECYCLED = 0.2  # share of the training after which errors are recycled; before it they are large


def sampler_sigmas(sampler: SamplerConfig = TAUGHT) -> Tensor:
    """Noise levels of the denoise passes."""
    return levels_of(sampler.steps, sampler.shift)


def levels_of(steps: Sequence[int], shift: float) -> Tensor:
    """Noise levels of steps of 1000: shift * u / (1 + (shift - 1) u) at u = step / 1000."""
    u = torch.tensor(steps, dtype=torch.float64) / 1000
    return (shift * u / (1 + (shift - 1) * u)).float()


def draw_sigmas(shape: tuple[int, ...], levels: Tensor, draw: np.random.Generator) -> Tensor:
    """Three of four noise levels from `levels`, the last twice as often; the others from the whole schedule."""
    weight = np.ones(len(levels))
    weight[-1] = 2
    chosen = levels[torch.from_numpy(draw.choice(len(levels), size=shape, p=weight / weight.sum()))]
    u = torch.from_numpy(draw.uniform(0.02, 1, size=shape)).float()
    whole = TAUGHT.shift * u / (1 + (TAUGHT.shift - 1) * u)
    return torch.where(torch.from_numpy(draw.random(shape) < 0.75), chosen, whole)


def spread(sigma: Tensor) -> Tensor:
    """(K, B, C) -> (K, B, C, 1, 1, 1, 1)"""
    return sigma[..., None, None, None, None]


def length_at(lengths: tuple[Length, ...], share: float, common: np.random.Generator) -> Length:
    """One of `lengths` when `share` of the training is done: the same in all processes."""
    blend = min(1.0, share / 0.4)
    weights = np.asarray([(1 - blend) * length.early + blend * length.late for length in lengths])
    return lengths[common.choice(len(lengths), p=weights / weights.sum())]


def training_step(
    world: World, config: EngineConfig, batch: Batch, context: Tensor, draw: np.random.Generator, plain: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss of one step, and x0 (B, C, ...) as the model now sees it through the least noise drawn for each chunk.

    plain: see `cfengine.training.coupling.couple`
    """
    B, C = batch.latents.shape[:2]
    device = batch.latents.device
    sigma = draw_sigmas((COPIES, B, C), sampler_sigmas(), draw).to(device)
    noise = torch.randn(COPIES, *batch.latents.shape, device=device)
    with mixed(device):
        seen = remember(world.dit, config.memory, context, world.text(batch.prompts))
        noise = couple(noise, sigma, batch, shown_in(seen, batch.yaws), plain)
        noisy = (1 - spread(sigma)) * batch.latents + spread(sigma) * noise
        guess = flow_from(world.dit, seen, noisy, 1000 * sigma)
    loss = (guess - (noise - batch.latents)).square().mean()
    return loss, made_of(batch.latents, context, noisy, guess, sigma)


@torch.no_grad()
def made_of(latents: Tensor, context: Tensor, noisy: Tensor, guess: Tensor, sigma: Tensor) -> Tensor:
    """x0 (B, C, ...) of the copy of each chunk with the least noise, where that is little; elsewhere the context.

    noisy, guess: (K, B, C, ...) and the flow seen in it      sigma: (K, B, C)
    """
    pick = spread(sigma.argmin(0, keepdim=True)).expand(1, *latents.shape)
    made = (noisy - spread(sigma) * guess).gather(0, pick)[0]
    near = spread(sigma.amin(0, keepdim=True) <= (sampler_sigmas()[-1] + 0.05).item())[0]
    return torch.where(near, made, context)


def train_diffusion(
    out: Path,
    world: World,
    config: EngineConfig,
    source: Source,
    seed: int,
    settings: Teacher,
    report: Callable[[str, dict], None],
) -> None:
    """Train `world` for `settings.steps`, going on from `out` where it exists; the state stays there."""
    steps, progress = settings.steps, Progress(world, settings)
    progress.resume(out)
    bank = ErrorBank(settings.recycle)
    bank.resume(out)
    device, mean = device_of(world), None
    while progress.step < steps:
        share = progress.step / steps
        common, draw = draws(seed, progress.step)
        length = length_at(settings.lengths, share, common)
        batch = source.draw(length.sessions, length.chunks, draw).on(device)
        made, begun, plain = None, share >= RECYCLED, max(0.0, 1 - share / PLAIN)
        for _ in range(3 if begun else 1):
            context = corrupt(batch.latents, made, draw, bank if begun else None)
            loss, made = training_step(progress.world, config, batch, context, draw, plain)
            loss.backward()
            progress.advance()
            bank.add(batch.latents, context, made, draw)
            mean = number(loss) if mean is None else 0.98 * mean + 0.02 * number(loss)
            if rank() == 0 and progress.step % 20 == 0:
                report("dit", {"step": progress.step, "of": steps, "loss": mean})
            if progress.step % 120 == 0:
                keep(out, progress, bank)
    keep(out, progress, bank)


def keep(out: Path, progress: Progress, bank: ErrorBank) -> None:
    """Save what the stage goes on from: the state is the first process's, a bank is every process's own."""
    if rank() == 0:
        progress.save(out)
    bank.save(out)
