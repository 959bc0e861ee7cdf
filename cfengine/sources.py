"""Where a model's files are: presets, local files and folders, hub ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from cfengine.checkpoint import read_json
from cfengine.config import PRESETS, EngineConfig, MemoryConfig, ModelConfig, preset
from cfengine.errors import CheckpointError, ConfigError
from cfengine.model.weights import infer_config

WEIGHTS = Path(__file__).parent / "weights"  # what the package ships
SMALL = "tiny-world"  # the model that `cfengine.training` makes
PARTS = ("dit", "codec", "text")  # of such a model, a .safetensors each


class Sources(NamedTuple):
    """What each part of a model loads from: a path or a hub id.      small: made by `cfengine.training`"""

    dit: str
    codec: str
    text: str
    small: bool = False


def config_of(name: str) -> EngineConfig:
    """Configuration of a preset, of a folder that `cfengine.training` wrote, or of a checkpoint by its tensors."""
    if name in PRESETS:
        return preset(name)
    if _small_folder(name):
        return _trained(name)
    if "/" not in name and not Path(name).exists():
        raise ConfigError(f"unknown model {name!r}: no such file or folder, and the presets are {', '.join(PRESETS)}")
    known = next((p for p in PRESETS.values() if p.dit_source == name), PRESETS["context-forcing"])
    return dataclasses.replace(known, name=name, model=infer_config(name))


def _trained(name: str) -> EngineConfig:
    """The small world's preset with the sizes and the memory rule that a training wrote beside its weights."""
    config, said = preset(SMALL), Path(name) / "model.json"
    if said.is_file():
        parts = read_json(said)
        try:
            model, memory = dict(parts["model"]), dict(parts["memory"])
            model["patch"] = tuple(model["patch"])
            config = dataclasses.replace(config, model=ModelConfig(**model), memory=MemoryConfig(**memory))
        except (KeyError, TypeError, ValueError) as problem:
            raise CheckpointError(f"{said} describes no model ({problem!r}); export the weights again") from problem
    return dataclasses.replace(config, name=name)


def sources_of(name: str, config: EngineConfig) -> Sources:
    """Where the parts of the model called `name` are; `config` names those that it does not bring."""
    if folder := _small_folder(name):
        files = (folder / f"{part}.safetensors" for part in PARTS)
        # a folder without a codec of its own has the shipped one
        return Sources(*(str(file if file.exists() else WEIGHTS / SMALL / file.name) for file in files), small=True)
    dit = config.dit_source if name in PRESETS else name
    rest = name if _is_wan_folder(name) else config.base_source
    return Sources(dit, rest, rest)


def _small_folder(name: str) -> Path | None:
    """Folder of a model that `cfengine.training` made: the one that is shipped, or one that holds all its parts."""
    if name in PRESETS:
        return None if PRESETS[name].dit_source else WEIGHTS / name
    folder = Path(name)
    return folder if all((folder / f"{part}.safetensors").is_file() for part in PARTS) else None


def _is_wan_folder(name: str) -> bool:
    """True for a local folder that brings its own VAE, and so its text encoder: a whole Wan release."""
    return any((Path(name) / part).exists() for part in ("Wan2.1_VAE.pth", "vae"))
