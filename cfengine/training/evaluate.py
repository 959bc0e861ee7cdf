"""A short look at trained weights: the world bench and the recall bench in little, in this process."""

from __future__ import annotations

from pathlib import Path

import torch

from cfengine.bench import recall, world
from cfengine.bench.records import write
from cfengine.engine import Engine
from cfengine.errors import ConfigError
from cfengine.training.settings import Evaluation


def evaluate(weights: Path, out: Path, settings: Evaluation) -> list[dict]:
    """Records of both benches, which are also written as `out`/evaluation.json; errors as the engine raises them.

    A world of so few seeds and scenes tells a broken training from a sound one, and not two sound ones apart.
    """
    if not (weights / "dit.safetensors").exists():
        raise ConfigError(f"{weights} holds no weights of a small world; train the student first, or name their folder")
    with torch.inference_mode(), Engine.from_pretrained(weights) as engine:
        values = world.evaluate(engine, range(settings.seeds), settings.seconds)
        scenes = tuple(range(settings.scenes))
        memory = engine.config.memory
        task = recall.Task(memory.policy, memory, str(weights), "hold", scenes, settings.times)
        done = recall.recall(engine, task)
    config = {"weights": str(weights), "seeds": settings.seeds, "seconds": settings.seconds}
    records = [*world.records(values, config), *recall.records([done])]
    write(out / "evaluation.json", records)
    return records
