"""An export folder: graphs, weight files, and a manifest that is written last."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfengine.codec import Codec
from cfengine.config import EngineConfig
from cfengine.errors import ConfigError
from cfengine.export.decoders import decoder_parts
from cfengine.export.files import locked, replaced, write, write_tensors
from cfengine.export.graphs import OPSET, externalise, onnx_package, trace
from cfengine.export.parts import Part, Port, dit_parts
from cfengine.model.dit import CausalDiT
from cfengine.segments.exported import SEGMENTS
from cfengine.segments.manifest import (
    FORMAT,
    NAME,
    NORMS,
    PRECISIONS,
    VERSION,
    Manifest,
    file_hash,
    model_hash,
    tensors_hash,
)

Progress = Callable[[str, int, int], None]  # what is done now, steps done, steps in all


def export(
    config: EngineConfig,
    model: CausalDiT,
    out: str | Path,
    *,
    codec: Codec | None = None,
    codec_source: str | None = None,
    precision: str = "fp32",
    sessions: int | str = 1,
    graphs: tuple[str, ...] | None = None,
    progress: Progress | None = None,
    once: bool = False,
) -> Manifest:
    """Write the graphs of a prepared transformer, and of a codec's decoder if given, to the folder `out`.

    precision: fp32, fp16 or bf16, of weights and operands      sessions: how many move in lock-step, "sessions" to
    leave it open      graphs: names of those wanted (all)      progress(what, done, total): called before each step
    codec_source: what the codec was loaded from, if not with the model      once: leave an export that is there by now
    One process at a time writes to `out`. An earlier export in it is replaced once the new one is whole; its plans and
    its calibration stay if the new one is of the same weights and sizes, and else go with it.
    Raises ExportError for what does not export, OutputError for a folder that holds something else or cannot be
    written, ConfigError for options that cannot be.
    """
    onnx_package()
    _check_options(config, model, precision, sessions)
    out, say = Path(out), progress or (lambda what, done, total: None)
    parts = _parts(config, model, codec, precision, sessions, graphs)
    with locked(out, lambda: say("waiting for another process that writes there", 0, len(parts) + 1)):
        if once and (out / NAME).is_file():
            return Manifest.load(out)
        with replaced(out) as folder:
            about = _about(config, model, codec, codec_source, precision, sessions, parts)
            described = {}
            for done, part in enumerate(parts):
                say(part.name, done, len(parts) + 1)
                described[part.name] = write_part(part, folder, _metadata(about, part))
            write_tensors(norms(model, PRECISIONS[precision]), folder / NORMS)
            say("hashes", len(parts), len(parts) + 1)
            write_manifest(folder, about | {"graphs": described})
            say("done", len(parts) + 1, len(parts) + 1)
        return Manifest.load(out)


def _check_options(config: EngineConfig, model: CausalDiT, precision: str, sessions: int | str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} cannot be exported; choose one of {', '.join(PRECISIONS)}")
    if sessions != "sessions" and not (isinstance(sessions, int) and sessions > 0):
        raise ConfigError(f"sessions is {sessions!r}; give a number from 1, or 'sessions' to leave it open")
    if config.precision.linears != "bf16" or any(block.fp8 for block in model.blocks):
        raise ConfigError(
            f"the model of {config.name!r} has weights in fp8, which are rounded for our own kernels; load it with "
            "precision 'bf16' and export that"
        )


def _parts(config, model, codec, precision: str, sessions: int | str, graphs: tuple[str, ...] | None) -> list[Part]:
    """The graphs to be; ConfigError for a name that none of them has."""
    dtype = PRECISIONS[precision]
    parts = dit_parts(config, model, dtype, sessions)
    if codec is not None:
        parts += decoder_parts(config, codec, decoder_type(config, dtype))
    names = [part.name for part in parts]
    unknown = [name for name in graphs or () if name not in (*names, *SEGMENTS)]  # one layer has no `middle`
    if unknown:
        raise ConfigError(f"there is no graph {unknown[0]!r} to export; choose among {', '.join(names)}")
    return [part for part in parts if graphs is None or part.name in graphs]


def decoder_type(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """Type of a decoder's graphs: the small world's codec is cheap and was trained in float32."""
    return torch.float32 if config.codec == "tiny_world" else dtype


def codec_hash(parts: list[Part]) -> str | None:
    """SHA-256 of a decoder's weights as they are exported; None where there is no decoder among the parts."""
    decoder = next((part for part in parts if part.name == "decoder"), None)
    return decoder and tensors_hash(decoder.weights[0](), decoder.inputs["latents"].dtype)


def write_part(part: Part, folder: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Write a part's weight sets and its graph; returns what the manifest says of it.

    metadata: what the graph's file is to say of itself
    """
    stem, sets = part.file or part.name, len(part.weights)
    files = [f"{stem}.{i:02d}.safetensors" if sets > 1 else f"{stem}.safetensors" for i in range(sets)]
    proto = trace(part)
    for name, weights in zip(files, part.weights, strict=True):
        write_tensors(weights(), folder / name)
    externalise(proto, part.weights[0](), folder / files[0])
    for key, value in metadata.items():
        proto.metadata_props.add(key=f"cfengine.{key}", value=value)
    write(folder / f"{part.name}.onnx", proto.SerializeToString(deterministic=True))
    return {
        "file": f"{part.name}.onnx",
        "weights": files,
        "inputs": [_operand(name, port) for name, port in part.inputs.items()],
        "outputs": [_operand(name, port) for name, port in part.outputs.items()],
    }


def _about(config, model, codec, codec_source, precision, sessions, parts: list[Part]) -> dict[str, Any]:
    """The description of an export, but for its graphs and files."""
    packages = ("cfengine", "torch", "onnx", "onnxscript")
    made = codec and {"name": config.codec, "hash": codec_hash(parts), "source": codec_source}
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "name": config.name,
            "hash": model_hash(model, PRECISIONS[precision]),
            "config": dataclasses.asdict(config.model),
        },
        "codec": made,
        "precision": precision,
        "opset": OPSET,
        "chunk_frames": config.memory.chunk_frames,
        "grid": config.grid,
        "latent": (config.video.latent_height, config.video.latent_width),
        "sessions": sessions,
        "made_with": {name: _version(name) for name in packages},
    }


def _metadata(about: dict[str, Any], part: Part) -> dict[str, str]:
    """What a graph says of itself where it is met without its folder."""
    operands = {name: list(port.shape) for name, port in (part.inputs | part.outputs).items()}
    decodes = part.name.startswith("decoder")
    return {
        "role": part.name,
        "weights_hash": about["codec"]["hash"] or "" if decodes else about["model"]["hash"],
        "precision": about["precision"],
        "shapes": json.dumps(operands),
    }


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Describe a folder that is otherwise complete."""
    files = sorted(path for path in folder.iterdir() if path.name != NAME)
    sizes = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files}
    write(folder / NAME, json.dumps(about | {"files": sizes}, indent=1).encode())


def norms(model: CausalDiT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the self-attentions' query and key norms."""
    return {
        f"blocks.{i}.norm_{part}": getattr(block.self_attn, f"norm_{part}").weight.detach().to("cpu", dtype)
        for i, block in enumerate(model.blocks)
        for part in "qk"
    }


def _operand(name: str, port: Port) -> dict[str, Any]:
    return {"name": name, "dtype": str(port.dtype).removeprefix("torch."), "shape": list(port.shape)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
