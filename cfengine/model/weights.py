"""DiT weights of every release this family has, from a file, a folder or the hub, checked against the configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfengine import checkpoint
from cfengine.config import ModelConfig
from cfengine.errors import CheckpointError
from cfengine.model.layouts import choose_variant, merge_lora, official_names

WHAT = "DiT weights"
LONGLIVE = ("longlive_base.pt", "lora.pt")
SELF_FORCING = "self_forcing_dmd.pt"
PUBLISHED = "diffusion_pytorch_model"  # stem of the Wan and of the diffusers files

_PUBLISHED_FILES = ("config.json", f"{PUBLISHED}*.safetensors", f"{PUBLISHED}.safetensors.index.json")
_DIFFUSERS_FILES = tuple(f"transformer/{name}" for name in _PUBLISHED_FILES)
HUB_FILES: dict[str, tuple[str, ...]] = {  # the rest of a repository is never downloaded
    "ShuoChen20/context_forcing": ("model.pt", "*/model.pt"),
    "gdhe17/Self-Forcing": (f"checkpoints/{SELF_FORCING}",),
    "Efficient-Large-Model/LongLive-1.3B": tuple(f"models/{name}" for name in LONGLIVE),
    "Wan-AI/Wan2.1-T2V-1.3B": _PUBLISHED_FILES,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _DIFFUSERS_FILES,
}
_ANY_FILES = (*_PUBLISHED_FILES, *_DIFFUSERS_FILES, "model.pt")
_HEADS = ("num_heads", "num_attention_heads")  # in the config.json of Wan and of diffusers
_TELLING = {  # tensors that show the sizes, and their dimensions
    "patch_embedding.weight": 5,
    "blocks.0.ffn.0.weight": 2,
    "head.head.weight": 2,
    "text_embedding.0.weight": 2,
    "time_embedding.0.weight": 2,
}
_WAN_HEAD_DIM = 128  # every published Wan model; heads cannot be read off the shapes


def load_dit(
    source: str | Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> dict[str, Tensor]:
    """Load a complete state dict in official Wan names, in `dtype` on `device`.

    source: file, folder or hub id of a release      variant: `generator` or `generator_ema` (default: EMA if present)
    Raises one CheckpointError that lists all missing, unexpected and mis-shaped tensors.
    """
    path, state = read_dit(source, variant)
    sizes = _sizes(state)
    remedy = "Pass the weights of a Wan 2.1 text-to-video DiT"
    if sizes and any(getattr(config, name) != size for name, size in sizes.items()):
        remedy = f"The file has {sizes}; choose the preset or ModelConfig of these sizes"
    checkpoint.check_shapes(state, expected_shapes(config), str(path), remedy)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}


def read_dit(source: str | Path, variant: str | None = None) -> tuple[Path, dict[str, Tensor]]:
    """Return the file read and its tensors in official names, as stored (on the CPU, usually memory-mapped)."""
    found = checkpoint.fetch(source, HUB_FILES.get(str(source), _ANY_FILES), WHAT)
    path = _file_in(found) if found.is_dir() else found
    if path.name in LONGLIVE:
        return path, _read_longlive(path.parent, variant)
    return path, _read_state(path, variant)


def infer_config(source: str | Path, *, heads: int | None = None, variant: str | None = None) -> ModelConfig:
    """Read a ModelConfig off the shapes of a checkpoint.

    heads and text_len are not in the shapes: they come from `heads`, else from a config.json beside the weights, else
    heads of 128 channels and 512 text tokens are assumed, as in every published Wan model.
    """
    path, state = read_dit(source, variant)
    sizes = _sizes(state)
    if not sizes:
        raise CheckpointError(f"{path} lacks the tensors {', '.join(_TELLING)}; it is not a Wan 2.1 text-to-video DiT")
    said = path.parent / "config.json"
    published = checkpoint.read_json(said) if said.is_file() else {}
    heads = heads or next((published[key] for key in _HEADS if key in published), None)
    if heads is None:
        heads, left = divmod(sizes["dim"], _WAN_HEAD_DIM)
        if left:
            raise CheckpointError(
                f"{path} has dim {sizes['dim']}, which is no multiple of Wan's head size {_WAN_HEAD_DIM}, "
                "and no config.json beside it tells the heads; pass heads"
            )
    _, _, *patch = state["patch_embedding.weight"].shape  # three: _sizes has seen to it
    text_len = published.get("text_len", ModelConfig.text_len)
    return ModelConfig(**sizes, heads=heads, patch=(patch[0], patch[1], patch[2]), text_len=text_len)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List the shape of every tensor of a DiT by its official name (825 tensors at the default sizes)."""
    dim, ffn, patch = config.dim, config.ffn_dim, math.prod(config.patch)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, config.in_channels, *config.patch),
        "patch_embedding.bias": (dim,),
        **_linear("text_embedding.0", dim, config.text_dim),
        **_linear("text_embedding.2", dim, dim),
        **_linear("time_embedding.0", dim, config.freq_dim),
        **_linear("time_embedding.2", dim, dim),
        **_linear("time_projection.1", 6 * dim, dim),
    }
    for i in range(config.layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= _linear(f"{block}.{attention}.{part}", dim, dim)
            shapes |= {f"{block}.{attention}.{norm}.weight": (dim,) for norm in ("norm_q", "norm_k")}
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        shapes |= _linear(f"{block}.ffn.0", ffn, dim) | _linear(f"{block}.ffn.2", dim, ffn)
    return shapes | {"head.modulation": (1, 2, dim)} | _linear("head.head", config.out_channels * patch, dim)


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Read the sizes that shapes show; empty when the telling tensors are not all there."""
    if any(name not in state or state[name].ndim != ndim for name, ndim in _TELLING.items()):
        return {}
    embed, ffn, head, text, time = (state[name].shape for name in _TELLING)
    layers = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    return {
        "dim": embed[0],
        "ffn_dim": ffn[0],
        "layers": max(layers) + 1,
        "in_channels": embed[1],
        "out_channels": head[0] // max(1, math.prod(embed[2:])),
        "text_dim": text[1],
        "freq_dim": time[1],
    }


def _file_in(folder: Path) -> Path:
    """Choose the weight file of a release's folder."""
    longlive = [f"{place}{name}" for name in LONGLIVE for place in ("", "models/")]
    for name in (*longlive, "model.pt", f"checkpoints/{SELF_FORCING}", SELF_FORCING):
        if (folder / name).is_file():
            return folder / name
    path = checkpoint.find(folder, (PUBLISHED, f"transformer/{PUBLISHED}"))
    nested = sorted(folder.glob("*/model.pt"))
    if path is None and len(nested) == 1:
        return nested[0]
    if path is None:
        wanted = ("model.pt", f"checkpoints/{SELF_FORCING}", *(f"models/{name}" for name in LONGLIVE))
        published = (f"{PUBLISHED}.safetensors", f"transformer/{PUBLISHED}.safetensors")
        raise checkpoint.nothing_found(folder, (*wanted, *published), WHAT)
    return path


def _read_state(path: Path, variant: str | None) -> dict[str, Tensor]:
    chosen = choose_variant(checkpoint.read(path), variant, str(path))
    return official_names(checkpoint.only_tensors(chosen, path), str(path))


def _read_longlive(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """Merge LongLive's two files; either one alone would load and be wrong without a word."""
    base, lora = (folder / name for name in LONGLIVE)
    for present, absent in ((base, lora), (lora, base)):
        if not absent.is_file():
            raise CheckpointError(
                f"{present} is one half of LongLive and {absent.name} is not beside it; "
                "fetch both files: the base weights need the LoRA merged into them"
            )
    adapter: Mapping[str, Any] = checkpoint.read(lora)
    nested = adapter.get("generator_lora")
    adapter = checkpoint.only_tensors(nested if isinstance(nested, Mapping) else adapter, lora)
    return merge_lora(_read_state(base, variant), adapter, where=str(lora))
