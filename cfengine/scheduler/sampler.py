"""Few-step flow matching: the schedule, and noise that depends on where it is used.

The schedule has 1,000 entries, sigma_i = shift u / (1 + (shift - 1) u) with u = 1 - i / 1000, in float32; steps count
from its noisy end (Self-Forcing, `utils/scheduler.py` and `pipeline/causal_inference.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cfengine.config import SamplerConfig
from cfengine.errors import ConfigError

LENGTH = 1000


class Schedule:
    """Timesteps and noise levels of the passes of a chunk.

    sigmas, timesteps: (1000,) float32      warped: the timesteps at which a chunk is denoised
    efforts: for each level of effort, full first, the passes that a chunk is made of, as places in `warped`
    costs: of a chunk at each level, in passes, the clean one counted, as a share of full effort
    """

    def __init__(self, config: SamplerConfig, *, reduced: bool = True) -> None:
        """reduced: with levels below full effort"""
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
        self.efforts = self._reduced() if reduced else (tuple(range(len(config.steps))),)
        self.costs = tuple((len(passes) + 1) / (len(config.steps) + 1) for passes in self.efforts)

    def _reduced(self) -> tuple[tuple[int, ...], ...]:
        """Levels of effort: each leaves out one more pass, until two are left.

        The first pass stays, for a chunk begins as noise alone, and so does the last, for nothing comes after it that
        could mend what it leaves. Of the others that one goes whose neighbours are nearest to one another in noise, so
        that the longest stretch between two passes grows by as little as it can: of 1000, 750, 500, 250, which are
        noise levels 1, 0.94, 0.83 and 0.63 at a shift of 5, first 750 and then 500. Every timestep that is left is one
        that the model was trained at.
        A pass keeps its place in the full schedule at every level: the noise of pass i is that of step i, whatever was
        left out before it, so what a chunk shows is a function of its level and not of how the level came about.
        """
        levels = [tuple(range(len(self.warped)))]
        while len(levels[-1]) > 2:
            left = levels[-1]
            noise = [self.sigma(self.warped[i]) for i in left]
            gone = min(range(1, len(left) - 1), key=lambda i: noise[i - 1] - noise[i + 1])
            levels.append(left[:gone] + left[gone + 1 :])
        return tuple(levels)

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
