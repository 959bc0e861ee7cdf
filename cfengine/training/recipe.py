"""The recipe of the shipped model: codec, strips of latents, diffusion, distillation, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from cfengine.config import EngineConfig, preset
from cfengine.errors import OutputError
from cfengine.model.text_tiny import TinyTextEncoder
from cfengine.training.codec import train_codec
from cfengine.training.data import build_strips
from cfengine.training.diffusion import train_diffusion
from cfengine.training.distil import train_distil
from cfengine.training.state import World

Report = Callable[[str, dict], None]


class Effort(NamedTuple):
    """How much of everything; the defaults made the shipped weights."""

    codec_steps: int = 650
    scenes: int = 2000
    dit_steps: int = 3000
    distil_steps: int = 300


def write_weights(world: World, folder: Path) -> None:
    """Write dit.safetensors and text.safetensors in float16 into an existing folder."""
    tensors = {name: tensor.half().contiguous() for name, tensor in world.dit.state_dict().items()}
    save_file(tensors, folder / "dit.safetensors", metadata={"format": "cfengine tiny-world dit"})
    TinyTextEncoder(world.table.detach()).save(folder / "text.safetensors")


def train(out: Path, seed: int, effort: Effort, report: Report, config: EngineConfig | None = None) -> Path:
    """Run every stage that is not finished in `out`, and return the folder with the weights.

    States and logs lie in `out`, the weights in `out`/weights, laid out as the package ships them.
    """
    try:
        (out / "weights").mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"training folder {out} cannot be made ({problem}); choose another --out") from problem
    config = config or preset("tiny-world")
    codec = train_codec(out / "codec.safetensors", seed, effort.codec_steps, report)
    codec.save(out / "weights" / "codec.safetensors")
    report("strips", {"scenes": effort.scenes})
    strips = build_strips(codec, effort.scenes, seed + 2, out / "strips.safetensors")
    teacher = train_diffusion(out / "dit.state", config, strips, seed + 3, effort.dit_steps, report)
    write_weights(teacher, out / "weights")
    if effort.distil_steps:
        student = train_distil(out / "distil.state", teacher, config, strips, seed + 4, effort.distil_steps, report)
        write_weights(student, out / "weights")
    return out / "weights"


def export_average(state: Path, config: EngineConfig, folder: Path) -> int:
    """Write the averaged network of an unfinished stage as weights; returns its step."""
    kept = torch.load(state, weights_only=True, mmap=True)
    world = World(config.model)
    world.load_state_dict(kept["average"])
    write_weights(world, folder)
    return int(kept["step"])
