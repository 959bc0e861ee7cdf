"""One stream to time: precision, memory rule, decoder, sessions, size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cfengine.bench.synthetic import SIZES, random_engine
from cfengine.config import EngineConfig, precision, with_policy
from cfengine.engine import Engine
from cfengine.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp8")
DECODERS = ("taehv", "wan_vae")


@dataclass(frozen=True)
class Setting:
    """One stream to time. resolution: (width, height), None for the size's own."""

    policy: str
    precision: str
    decoder: str = "taehv"
    sessions: int = 1
    size: str = "full"
    resolution: tuple[int, int] | None = None

    def config(self) -> EngineConfig:
        """The engine's configuration; a threshold that no cosine reaches fills the memory."""
        config = SIZES[self.size]
        memory = replace(with_policy(config.memory, self.policy), threshold=2.0)
        video = config.video
        if self.resolution is not None:
            video = replace(video, width=self.resolution[0], height=self.resolution[1])
        return precise(replace(config, memory=memory, video=video, codec=self.decoder), self.precision)

    @property
    def suffix(self) -> str:
        """What tells this stream's records from those of the plain one: its precision and all that is not usual."""
        parts = [self.precision]
        parts += [self.policy] if self.policy != SIZES[self.size].memory.policy else []
        parts += [self.decoder] if self.decoder != DECODERS[0] else []
        parts += ["x".join(map(str, self.resolution))] if self.resolution else []
        parts += [f"{self.sessions}_sessions"] if self.sessions > 1 else []
        return "_".join(parts + (["toy"] if self.size == "toy" else []))

    def engine(self, device: str, *, graphs: bool = True) -> Engine:
        """An engine of random weights."""
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        return random_engine(self.config(), device, dtype, graphs=graphs)


def precise(config: EngineConfig, name: str) -> EngineConfig:
    """The same configuration computed in a precision; fp32 and bf16 differ in the type of the weights alone."""
    return replace(config, precision=precision("bf16" if name == "fp32" else name))


def resolution(text: str | None) -> tuple[int, int] | None:
    """(width, height) of "832x480", None where nothing was given; ConfigError for anything else."""
    if text is None:
        return None
    width, found, height = text.lower().partition("x")
    if not (found and width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--resolution is {text!r}; give WIDTHxHEIGHT in pixels, such as 832x480")
    return int(width), int(height)
