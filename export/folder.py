"""An export folder: graphs, weight files, and a manifest that is written last."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfengine.codec import Codec
from cfengine.config import EngineConfig
from cfengine.errors import ConfigError, OutputError
from cfengine.export.decoders import decoder_parts
from cfengine.export.graphs import OPSET, externalise, onnx_package, trace
from cfengine.export.parts import Part, Port, dit_parts
from cfengine.model.dit import CausalDiT
from cfengine.segments.manifest import FORMAT, NAME, NORMS, PRECISIONS, VERSION, Manifest, file_hash, model_hash

Progress = Callable[[str, int, int], None]  # what is done now, steps done, steps in all


def export(
    config: EngineConfig,
    model: CausalDiT,
    out: str | Path,
    *,
    codec: Codec | None = None,
    precision: str = "fp32",
    sessions: int | str = 1,
    graphs: tuple[str, ...] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the graphs of a prepared transformer, and of a codec's decoder if given, to the folder `out`.

    precision: fp32, fp16 or bf16, of weights and operands      sessions: how many move in lock-step, "sessions" to
    leave it open      graphs: names of those wanted (all)      progress(what, done, total): called before each step
    An earlier export in `out` is replaced once the new one is whole. Raises ExportError for what does not export,
    OutputError for a folder that holds something else, ConfigError for options that cannot be.
    """
    onnx_package()
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} cannot be exported; choose one of {', '.join(PRECISIONS)}")
    if config.precision.linears != "bf16":
        raise ConfigError(
            f"the model of {config.name!r} has weights in {config.precision.linears}, which are rounded for our own "
            "kernels; load it with precision 'bf16' and export that"
        )
    dtype = PRECISIONS[precision]
    parts = dit_parts(config, model, dtype, sessions)
    if codec is not None:
        # the small world's codec is cheap and was trained in float32
        parts += decoder_parts(config, codec, torch.float32 if config.codec == "tiny_world" else dtype)
    parts = [part for part in parts if graphs is None or part.name in graphs]
    say = progress or (lambda what, done, total: None)
    with replaced(Path(out)) as folder:
        described = {}
        for done, part in enumerate(parts):
            say(part.name, done, len(parts) + 1)
            described[part.name] = write_part(part, folder)
        write_tensors(norms(model, dtype), folder / NORMS)
        say("hashes", len(parts), len(parts) + 1)
        write_manifest(folder, config, model, precision, sessions, described, codec)
        say("done", len(parts) + 1, len(parts) + 1)
    return Manifest.load(out)


def write_part(part: Part, folder: Path) -> dict[str, Any]:
    """Write a part's weight sets and its graph; returns what the manifest says of it."""
    stem, sets = part.file or part.name, len(part.weights)
    files = [f"{stem}.{i:02d}.safetensors" if sets > 1 else f"{stem}.safetensors" for i in range(sets)]
    proto = trace(part)
    for name, weights in zip(files, part.weights, strict=True):
        write_tensors(weights(), folder / name)
    externalise(proto, part.weights[0](), folder / files[0])
    (folder / f"{part.name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    return {
        "file": f"{part.name}.onnx",
        "weights": files,
        "inputs": [_operand(name, port) for name, port in part.inputs.items()],
        "outputs": [_operand(name, port) for name, port in part.outputs.items()],
    }


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; OutputError where the disk does not take it."""
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
        path.chmod(0o644)  # safetensors keeps others out; a folder is made to be copied
    except Exception as error:  # safetensors raises types of its own beside the system's
        raise OutputError(f"{path} cannot be written ({error}); free space, or choose another folder") from error


def write_manifest(
    folder: Path,
    config: EngineConfig,
    model: CausalDiT,
    precision: str,
    sessions: int | str,
    graphs: dict[str, Any],
    codec: Codec | None,
) -> None:
    """Describe a folder that is otherwise complete."""
    files = sorted(path for path in folder.iterdir() if path.name != NAME)
    packages = ("cfengine", "torch", "onnx", "onnxscript")
    about = {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "name": config.name,
            "hash": model_hash(model, PRECISIONS[precision]),
            "config": dataclasses.asdict(config.model),
        },
        "codec": config.codec if codec is not None else None,
        "precision": precision,
        "opset": OPSET,
        "chunk_frames": config.memory.chunk_frames,
        "grid": config.grid,
        "latent": (config.video.latent_height, config.video.latent_width),
        "sessions": sessions,
        "made_with": {name: _version(name) for name in packages},
        "graphs": graphs,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files},
    }
    (folder / NAME).write_text(json.dumps(about, indent=1), encoding="utf-8")


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` at the end, and leaves nothing behind where something fails.

    OutputError where `out` holds something other than an export.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / NAME).is_file()):
        raise OutputError(f"{out} exists and is no export; choose a new folder, or delete it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error.strerror}); choose another folder") from error
    try:
        yield fresh
        os.chmod(fresh, 0o755)  # mkdtemp keeps others out
        if out.exists():
            shutil.rmtree(out)
        os.replace(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


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
