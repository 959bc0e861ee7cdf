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
from cfengine.training.diffusion import early_state, train_diffusion
from cfengine.training.distil import train_distil
from cfengine.training.parallel import in_processes
from cfengine.training.state import World

Report = Callable[[str, dict], None]


STUDENTS = (4, 6)  # what the seeds of the students add, whose mean is shipped


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

    The shipped weights took these amounts from seed 0, on two cores that had other work too: 76 minutes to the teacher,
    then, from its weights in float16, 20 and 17 minutes for the students. (The teacher's early self, at step 720 of
    3000, was trained again for them, in 10.)
    """

    codec_steps: int = 2400
    decoder_steps: int = 1000
    scenes: int = 3000
    dit_steps: int = 3000
    distil_steps: int = 360  # of each student


def averaged(state: Path, config: EngineConfig) -> tuple[World, int]:
    """Load the averaged network of a stage and its step."""
    kept = torch.load(state, weights_only=True, mmap=True)
    world = World(config.model)
    world.load_state_dict(kept["average"])
    return world.requires_grad_(False), int(kept["step"])


def write_weights(world: World, folder: Path) -> None:
    """Write dit.safetensors and text.safetensors in float16 into an existing folder."""
    tensors = {name: tensor.half().contiguous() for name, tensor in world.dit.state_dict().items()}
    save_file(tensors, folder / "dit.safetensors", metadata={"format": "cfengine tiny-world dit"})
    TinyTextEncoder(world.table.detach()).save(folder / "text.safetensors")


def _diffusion(out: Path, config: EngineConfig, effort: Effort, seed: int, report: Report) -> None:
    """The diffusion stage of one process."""
    strips = build_strips(None, effort.scenes, seed + 2, out / "strips.safetensors")
    train_diffusion(out / "dit.state", config, strips, seed + 3, effort.dit_steps, report)


def mean_of(worlds: list[World]) -> World:
    """The mean of the weights of students of one teacher, which lie close enough for it to be a student too.

    Wortsman et al., arXiv 2203.05482, average fine-tuned models so.
    """
    mean = copy.deepcopy(worlds[0])
    for parts in zip(mean.parameters(), *(world.parameters() for world in worlds), strict=True):
        parts[0].copy_(torch.stack(parts[1:]).mean(0))
    return mean


def _distillation(
    out: Path, name: str, steps: int, own: int, config: EngineConfig, effort: Effort, seed: int, report: Report
) -> None:
    """The distillation of one student, in one process."""
    strips = build_strips(None, effort.scenes, seed + 2, out / "strips.safetensors")
    state = out / "dit.state"
    (teacher, _), (early, _) = averaged(state, config), averaged(early_state(state), config)
    train_distil(out / name, teacher, early, config, strips, seed + own, steps, report)


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
    students = []
    for own in STUDENTS if effort.distil_steps else ():
        name = f"student{own}.state"
        in_processes(processes, _distillation, out, name, effort.distil_steps, own, config, effort, seed, report)
        students.append(averaged(out / name, config)[0])
    write_weights(mean_of(students) if students else averaged(out / "dit.state", config)[0], weights)
    return weights
