"""Few-step flow matching: the schedule, and noise that depends on where it is used.

The schedule has 1,000 entries, sigma_i = shift u / (1 + (shift - 1) u) with u = 1 - i / 1000, in float32; steps count
from its noisy end (Self-Forcing, `utils/scheduler.py` and `pipeline/causal_inference.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfengine.config import EngineConfig, SamplerConfig
from cfengine.errors import ConfigError
from cfengine.memory.pages import near_slots

LENGTH = 1000


class Effort(NamedTuple):
    """What a level of effort leaves of a chunk's denoise passes.

    passes: places in `Schedule.warped`      near: whether they attend to the sink and the nearest slots alone
    """

    passes: tuple[int, ...]
    near: bool = False


def near_share(config: EngineConfig) -> float:
    """What a pass that looks near alone costs of one that reads a full memory; 1.0 where it reads as much.

    Multiply-adds of a token in a block: (6 dim + 2 ffn_dim) dim in its products, queries, keys, values and outputs of
    both attentions and the feed-forward, and 2 dim for each token of each slot that it attends to. The prompt, the head
    and the embeddings, about 1 % of a pass, are left out.
    """
    model, memory = config.model, config.memory
    products, slot = 6 * model.dim + 2 * model.ffn_dim, 2 * config.page_tokens  # each times dim
    return (products + near_slots(memory) * slot) / (products + memory.slots * slot)


class Schedule:
    """Timesteps and noise levels of the passes of a chunk.

    sigmas, timesteps: (1000,) float32      warped: the timesteps at which a chunk is denoised
    efforts: the levels of effort, full first
    costs: of a chunk at each level, in passes, the clean one counted, as a share of full effort
    """

    def __init__(self, config: SamplerConfig, *, reduced: bool = True, near: float = 1.0) -> None:
        """reduced: with levels below full effort      near: see `near_share`; at 1.0 no level looks near alone"""
        bad = [step for step in config.steps if not 0 < step <= LENGTH]
        if bad or not config.steps:
            raise ConfigError(
                f"sampler step {bad[0] if bad else 'list'} is outside 1..{LENGTH}; set SamplerConfig.steps"
            )
        u = torch.linspace(1.0, 0.0, LENGTH + 1)[:-1]
        self.sigmas = config.shift * u / (1 + (config.shift - 1) * u)
        self.timesteps = self.sigmas * LENGTH
        self.warped = [float(self.timesteps[LENGTH - step]) if config.warp else float(step) for step in config.steps]
        self.context_timestep = config.context_timestep
        self._levels: dict[float, float] = {}
        full = Effort(tuple(range(len(config.steps))))
        self.efforts = self._reduced(full, near < 1) if reduced else (full,)
        self.costs = tuple(
            (len(passes) * (near if is_near else 1) + 1) / (len(full.passes) + 1) for passes, is_near in self.efforts
        )

    def _reduced(self, full: Effort, near: bool) -> tuple[Effort, ...]:
        """Levels of effort: each leaves out one more pass, until two are left; the last looks near alone besides.

        The first pass stays, for a chunk begins as noise alone, and so does the last, for nothing comes after it that
        could mend what it leaves. Of the others that one goes whose neighbours are nearest to one another in noise, so
        that the longest stretch between two passes grows by as little as it can: of 1000, 750, 500, 250, which are
        noise levels 1, 0.94, 0.83 and 0.63 at a shift of 5, first 750 and then 500. Every timestep that is left is one
        that the model was trained at.
        A pass keeps its place in the full schedule at every level: the noise of pass i is that of step i, whatever was
        left out before it, so what a chunk shows is a function of its level and not of how the level came about.
        Passes go before the window: one less saves a fifth of a chunk of four whatever the picture's size, and those
        that stay see all that is remembered. What a smaller window saves depends on how much of a pass is attention,
        and it takes from the chunk what a long memory is for.
        """
        levels = [full]
        while len(left := levels[-1].passes) > 2:
            noise = [self.sigma(self.warped[i]) for i in left]
            gone = min(range(1, len(left) - 1), key=lambda i: noise[i - 1] - noise[i + 1])
            levels.append(Effort(left[:gone] + left[gone + 1 :]))
        return (*levels, Effort(left, near=True)) if near else tuple(levels)

    def sigma(self, timestep: float) -> float:
        """Noise level of the nearest timestep."""
        if timestep not in self._levels:
            self._levels[timestep] = float(self.sigmas[(self.timesteps - timestep).abs().argmin()])
        return self._levels[timestep]


def counter_noise(seed: int, frame: int, step: int, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    """Standard normal noise as a function of (seed, latent frame, step) alone; float32, into `out` where given.

    Philox (Salmon et al., SC 2011) keyed by the seed, counted from (frame, step): what was streamed before does not
    matter, and two sessions with the same seed see the same noise, on every device.
    """
    generator = np.random.Generator(np.random.Philox(key=int(seed), counter=[0, 0, frame, step]))
    if out is None:
        out = torch.empty(shape, dtype=torch.float32)
    generator.standard_normal(shape, dtype=np.float32, out=out.numpy())
    return out


def chunk_noise(seed: int, first_frame: int, frames: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of the frames of a chunk: (frames, *shape)."""
    return torch.stack([counter_noise(seed, first_frame + i, step, shape) for i in range(frames)])
