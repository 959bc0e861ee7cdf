"""Segments of a backend that runs exported graphs: from a folder, or from the cache, exported on first use."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

import torch

from cfengine.config import EngineConfig, cache_dir
from cfengine.errors import ConfigError, ExportError
from cfengine.export.folder import Progress, export
from cfengine.export.graphs import OPSET
from cfengine.model.dit import CausalDiT
from cfengine.ops import Ops
from cfengine.segments.exported import SEGMENTS, GraphSegments
from cfengine.segments.manifest import NAME, NORMS, PRECISIONS, VERSION, Manifest, model_hash
from cfengine.segments.onnx import onnx_segments

OPEN = "sessions"  # exports for the cache serve any number of sessions in lock-step


def open_onnx(
    config: EngineConfig,
    model: CausalDiT,
    ops: Ops,
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> GraphSegments:
    """Segments in ONNX Runtime for a prepared transformer on the CPU.

    folder: an export; without one the cache's, which is made first where there is none      progress: see `export`
    Raises ExportError for a folder that is damaged or of other weights or sizes, ConfigError for what cannot run.
    """
    if model.patch_embedding.weight.device.type != "cpu":
        raise ConfigError("backend 'onnxruntime' runs on the CPU; choose device 'cpu', or another backend")
    if model.dtype != torch.float32:
        raise ConfigError(
            f"backend 'onnxruntime' runs in float32 and the model is in {str(model.dtype).removeprefix('torch.')}; "
            "load it with dtype 'float32'"
        )
    manifest = open_folder(config, model, folder, progress)
    return onnx_segments(manifest, ops)


def open_folder(
    config: EngineConfig, model: CausalDiT, folder: str | Path | None = None, progress: Progress | None = None
) -> Manifest:
    """The export of a model in its own precision, checked: files, weights, sizes."""
    precision = next((name for name, dtype in PRECISIONS.items() if dtype == model.dtype), "fp32")
    if folder is None:
        folder = cache_folder(config, model, precision)
        if not (folder / NAME).is_file():
            options = {"precision": precision, "sessions": OPEN, "graphs": SEGMENTS, "once": True}
            export(config, model, folder, progress=progress, **options)
    manifest = Manifest.load(folder)
    if manifest.precision != precision:
        way = "an engine has no fp16" if manifest.precision == "fp16" else "load the model in that type"
        raise ExportError(
            f"{manifest.folder} is in {manifest.precision} and the model runs in {precision}; {way}, or run "
            f"{manifest.command_in(precision)}"
        )
    manifest.check_model(model, config.name)
    check_sizes(manifest, config)
    used = [manifest.graphs[name] for name in SEGMENTS if name in manifest.graphs]
    manifest.verify([NORMS, *(file for graph in used for file in (graph.file, *graph.weights))])
    return manifest


def check_sizes(manifest: Manifest, config: EngineConfig) -> None:
    """Raise ExportError unless a folder was made for chunks and pictures of the configured sizes."""
    latent = config.video.latent_height, config.video.latent_width
    command = manifest.command_in(manifest.precision, pixels=(config.video.width, config.video.height))
    for what, found, wanted, way in (
        ("latent rows and columns", manifest.latent, latent, f"run {command}"),
        ("rows and columns of tokens", manifest.grid, config.grid, f"run {command}"),
        ("latent frames a chunk", manifest.chunk_frames, config.memory.chunk_frames, "export this configuration"),
    ):
        if found != wanted:
            raise ExportError(f"{manifest.folder} was made for {what} {found} and {config.name!r} has {wanted}; {way}")


def cache_folder(config: EngineConfig, model: CausalDiT, precision: str) -> Path:
    """Where the cache keeps a model's export: a name of everything that its graphs and weights depend on."""
    about = {
        "weights": model_hash(model, PRECISIONS[precision]),
        "sizes": [config.memory.chunk_frames, config.video.latent_height, config.video.latent_width],
        "patch": config.model.patch,
        "precision": precision,
        "opset": OPSET,
        "format": VERSION,
        "made_with": [importlib.metadata.version(name) for name in ("torch", "onnxscript")],
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "_", config.name)
    return cache_dir() / "exports" / f"{name}-{precision}-{key}"
