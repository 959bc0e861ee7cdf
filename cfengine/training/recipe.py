"""The recipe of the shipped model: codec, strips of latents, diffusion, distillation, weights."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from cfengine.config import EngineConfig, preset
from cfengine.errors import OutputError
from cfengine.model.text_tiny import TinyTextEncoder
from cfengine.training.codec import refine_decoder, train_codec
from cfengine.training.data import build_strips
from cfengine.training.diffusion import train_diffusion
from cfengine.training.distil import train_distil
from cfengine.training.parallel import in_processes
from cfengine.training.state import World

BLEND = 0.5  # how far the shipped weights lie from the teacher towards the student
Report = Callable[[str, dict], None]


class Log:
    """One line a report on standard error, and the same as JSON lines in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.begun = path, time.monotonic()

    def __call__(self, stage: str, values: dict) -> None:
        seconds = time.monotonic() - self.begun
        words = " ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        sys.stderr.write(f"{seconds:8.1f} s  {stage:7s} {words}\n")
        sys.stderr.flush()
        with self.path.open("a") as file:
            file.write(json.dumps({"seconds": round(seconds, 1), "stage": stage, **values}) + "\n")


class Effort(NamedTuple):
    """How much of everything.

    The shipped weights took these amounts in one run from seed 0 (76 minutes on two cores that had other work too), but
    with the sampler's last step at 250 instead of 150, so a run with the defaults makes similar weights, not the same.
    """

    codec_steps: int = 2400
    decoder_steps: int = 1000
    scenes: int = 3000
    dit_steps: int = 3000
    distil_steps: int = 0


def averaged(state: Path, config: EngineConfig) -> tuple[World, int]:
    """Load the averaged network of a stage and its step."""
    kept = torch.load(state, weights_only=True, mmap=True)
    world = World(config.model)
    world.load_state_dict(kept["average"])
    return world.requires_grad_(False), int(kept["step"])


def between(teacher: World, student: World, share: float) -> World:
    """Weights on the line from teacher to student.

    The student starts from the teacher, so the line stays good: the middle keeps the teacher's hold on what is in view
    (primed landmarks right: teacher 0.71, student 0.36) and the student's sharpness (0.68 and 0.74).
    """
    mixed = copy.deepcopy(teacher)
    for mean, other in zip(mixed.parameters(), student.parameters(), strict=True):
        mean.lerp_(other, share)
    return mixed


def write_weights(world: World, folder: Path) -> None:
    """Write dit.safetensors and text.safetensors in float16 into an existing folder."""
    tensors = {name: tensor.half().contiguous() for name, tensor in world.dit.state_dict().items()}
    save_file(tensors, folder / "dit.safetensors", metadata={"format": "cfengine tiny-world dit"})
    TinyTextEncoder(world.table.detach()).save(folder / "text.safetensors")


def _diffusion(out: Path, config: EngineConfig, effort: Effort, seed: int, report: Report) -> None:
    """The diffusion stage of one process."""
    strips = build_strips(None, effort.scenes, seed + 2, out / "strips.safetensors")
    train_diffusion(out / "dit.state", config, strips, seed + 3, effort.dit_steps, report)


def _distillation(out: Path, config: EngineConfig, effort: Effort, seed: int, report: Report) -> None:
    """The distillation stage of one process."""
    strips = build_strips(None, effort.scenes, seed + 2, out / "strips.safetensors")
    teacher, _ = averaged(out / "dit.state", config)
    train_distil(out / "distil.state", teacher, config, strips, seed + 4, effort.distil_steps, report)


def train(
    out: Path, seed: int, effort: Effort, report: Report, *, processes: int = 2, config: EngineConfig | None = None
) -> Path:
    """Run every stage that is not finished in `out`, and return the folder with the weights.

    States and logs lie in `out`, the weights in `out`/weights, laid out as the package ships them.
    """
    weights = out / "weights"
    try:
        weights.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"training folder {out} cannot be made ({problem}); choose another --out") from problem
    config = config or preset("tiny-world")
    codec = train_codec(out / "codec.safetensors", seed, effort.codec_steps, report)
    report("strips", {"scenes": effort.scenes})
    build_strips(codec, effort.scenes, seed + 2, out / "strips.safetensors")
    refined = refine_decoder(codec, out / "refined.safetensors", seed + 5, effort.decoder_steps, report)
    refined.save(weights / "codec.safetensors")
    in_processes(processes, _diffusion, out, config, effort, seed, report)
    teacher, _ = averaged(out / "dit.state", config)
    if effort.distil_steps:
        in_processes(processes, _distillation, out, config, effort, seed, report)
        student, _ = averaged(out / "distil.state", config)
        teacher = between(teacher, student, BLEND)
    write_weights(teacher, weights)
    return weights
