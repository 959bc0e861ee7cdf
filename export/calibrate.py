"""Largest inputs of a model's products over real chunks: what 8-bit and 4-bit scales are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cfengine.config import EngineConfig, PrecisionConfig
from cfengine.errors import ConfigError, ExportError
from cfengine.export.files import write
from cfengine.memory.memory import Memory
from cfengine.model.dit import Block, CausalDiT
from cfengine.ops import select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import Schedule, chunk_noise
from cfengine.segments.torch import TorchSegments

NAME = "calibration.json"
PROMPTS = (  # scenes that the small world knows too: three lights, both pans, and a camera that stands still
    "pan right over a meadow, clear day",
    "pan left over a desert at sunset",
    "pan right over snow at night",
    "hold, meadow in fog",
)
CHUNKS = 4  # of each prompt: the memory then holds sink, slow and fast frames


@dataclass(frozen=True)
class Calibration:
    """largest: `blocks.<number>.<product>` -> largest magnitude that entered the product      model_hash: of weights
    whose activations these are      made_from: what was streamed, in words"""

    model_hash: str
    made_from: str
    largest: dict[str, float]

    def save(self, folder: Path) -> None:
        """Write `calibration.json`, whole or not at all; OutputError where the disk does not take it."""
        write(folder / NAME, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: Path, model_hash: str) -> Calibration | None:
        """Read a folder's calibration; None where there is none, or one of other weights."""
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ExportError(f"{path} is damaged ({error}); delete it, and the next build calibrates again") from error
        return found if found.model_hash == model_hash else None


def calibrate(
    config: EngineConfig,
    model: CausalDiT,
    encode: Callable[[str], Tensor],
    model_hash: str,
    *,
    prompts: Sequence[str] = PROMPTS,
    chunks: int = CHUNKS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Calibration:
    """Stream some chunks of every prompt with a prepared model whose products are not rounded, and watch.

    encode: prompt -> embedding (n, text_dim)      model_hash: of the export that the scales are for
    progress(what, done, total): called before each chunk
    """
    config = replace(config, precision=PrecisionConfig())
    device = model.patch_embedding.weight.device
    ops = select(device.type, dict(config.kernels))
    scheduler = ChunkScheduler(model, TorchSegments(model, ops, config.grid), Schedule(config.sampler))
    shape = config.model.in_channels, config.video.latent_height, config.video.latent_width
    frames = config.memory.chunk_frames
    with watched(model) as largest:
        for seed, prompt in enumerate(prompts):
            memory = Memory(config, ops, model.dtype, device)
            cross = model.project_text(encode(prompt).to(device))
            for chunk in range(chunks):
                progress(f"{prompt}: chunk {chunk + 1}", seed * chunks + chunk, len(prompts) * chunks)
                start = chunk * frames
                noise = partial(_noise, seed, start, frames, shape)
                x0 = scheduler.denoise(memory, cross, start, noise)
                scheduler.clean_pass(memory, cross, start, x0, full=True)
    lost = [name for name, value in largest.items() if not math.isfinite(value)]
    if lost:
        raise ExportError(f"{lost[0]} was given values that are not finite; check the model, nothing can be scaled so")
    made_from = f"{chunks} chunks of each of {len(prompts)} prompts"
    return Calibration(model_hash, made_from, dict(largest))


def _noise(seed: int, start: int, frames: int, shape: tuple[int, int, int], step: int) -> Tensor:
    return chunk_noise(seed, start, frames, step, shape)


@contextmanager
def watched(model: CausalDiT) -> Iterator[dict[str, float]]:
    """A dictionary that follows the largest input of every product while the context lasts."""
    largest: dict[str, float] = {}
    if any(block.fp8 for block in model.blocks):
        raise ConfigError("calibration needs the model's weights as they are; load it with precision 'bf16'")
    for number, block in enumerate(model.blocks):
        block.project = partial(_project, block, f"blocks.{number}", largest)
    try:
        yield largest
    finally:
        for block in model.blocks:
            del block.project


def _project(block: Block, where: str, largest: dict[str, float], ops: Any, name: str, rows, **options):
    """`Block.project`, and a look at what goes in."""
    entering = F.gelu(rows, approximate="tanh") if options.get("gelu") else rows
    key = f"{where}.{name}"
    most = float(entering.abs().max())
    largest[key] = most if math.isnan(most) else max(largest.get(key, 0.0), most)  # not a number: it stays so
    return Block.project(block, ops, name, rows, **options)
