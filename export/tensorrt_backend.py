"""Segments in TensorRT for an engine: plans from a folder or from the cache, built on first use; and their speed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cfengine.config import EngineConfig, cache_dir
from cfengine.errors import ConfigError
from cfengine.export.backend import open_folder
from cfengine.export.build import build
from cfengine.export.calibrate import Calibration, calibrate
from cfengine.export.folder import Progress
from cfengine.model.dit import CausalDiT, CrossCache
from cfengine.ops import Ops
from cfengine.segments.choice import fastest
from cfengine.segments.exported import SEGMENTS, GraphSegments
from cfengine.segments.manifest import Manifest
from cfengine.segments.tensorrt import TensorRTRunner
from cfengine.segments.tensorrt_library import gpu_library, installed, library
from cfengine.segments.tensorrt_plans import NAME, Plans, describe, plans_folder
from cfengine.segments.torch import TorchSegments

ROUNDS = 5  # timed passes, of which the median counts; one before them warms up


def open_tensorrt(
    config: EngineConfig,
    model: CausalDiT,
    ops: Ops,
    encode: Callable[[str], Tensor],
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> GraphSegments:
    """Segments in TensorRT for a transformer on a GPU whose products were not rounded when it was prepared.

    folder: an export; without one the cache's, which is made first where there is none. Plans for this GPU and this
    precision are taken from it, or built into it      encode: prompt -> embedding, for the calibration of fp8
    Raises ExportError for a folder that is damaged or of other weights or sizes, ConfigError for what cannot run.
    """
    device = model.patch_embedding.weight.device
    if device.type != "cuda":
        raise ConfigError("backend 'tensorrt' runs on a GPU; choose device 'cuda', or backend 'torch'")
    if model.dtype != torch.bfloat16:
        kind = str(model.dtype).removeprefix("torch.")
        raise ConfigError(f"backend 'tensorrt' runs in bfloat16 and the model is in {kind}; load it in bfloat16")
    manifest = open_folder(config, model, folder, progress)
    precision = "fp8" if config.precision.linears == "fp8" else manifest.precision
    plans = find_plans(manifest, precision)
    if plans is None:
        scales = _scales(config, model, encode, manifest, progress) if precision == "fp8" else None
        options = {"precision": precision, "calibration": scales, "graphs": SEGMENTS, "progress": progress}
        (plans,) = build(manifest.folder, target="current", **options)
    runner = TensorRTRunner(manifest, plans, device, progress=progress)
    segments = GraphSegments(manifest, runner, ops, fixed=plans.symbols)
    with torch.inference_mode():
        one_pass(segments, config, model)()  # TensorRT-RTX compiles kernels when they are first needed
    runner.save_cache()
    return segments


def find_plans(manifest: Manifest, precision: str) -> Plans | None:
    """Plans of an export for the GPU at hand, those built on it before portable ones; None where there are none."""
    library, capability = gpu_library()
    for target in ("current", "rtx"):
        folder = plans_folder(manifest.folder, target, precision)
        if (folder / NAME).is_file():
            about = describe(folder)
            fits = about.get("model", {}).get("hash") == manifest.model_hash and capability in about.get("targets", {})
            if fits and about.get("library", {}).get("name") in (library, "tensorrt_rtx"):
                return Plans.load(folder, capability)
    return None


def _scales(config, model, encode, manifest: Manifest, progress: Progress | None) -> Calibration:
    """The folder's calibration, made first where there is none."""
    found = Calibration.load(manifest.folder, manifest.model_hash)
    if found is None:
        options = {"progress": progress} if progress else {}
        found = calibrate(config, model, encode, manifest.model_hash, **options)
        found.save(manifest.folder)
    return found


def open_fastest(
    config: EngineConfig, model: CausalDiT, ops: Ops, encode: Callable[[str], Tensor], **options: Any
) -> GraphSegments | None:
    """TensorRT's segments where they run a pass faster than torch's, None where torch is to run them.

    Both are measured once on a GPU, and the cache remembers it. A model that torch is to run is prepared again, in the
    precision of the configuration      options: of `open_tensorrt`
    """
    opened: list[GraphSegments] = []

    def tensorrt() -> float:
        opened.append(open_tensorrt(config, model, ops, encode, **options))
        return pass_seconds(opened[0], config, model)

    def plain() -> float:
        model.prepare(config.precision)
        return pass_seconds(TorchSegments(model, ops, config.grid), config, model)

    best = "torch"
    if model.patch_embedding.weight.device.type == "cuda" and installed():
        # TensorRT first: it wants the weights as they are
        best = fastest({"tensorrt": tensorrt, "torch": plain}, cache_dir() / "backends.json", _key(config, model))
    if best == "tensorrt":
        return opened[0] if opened else open_tensorrt(config, model, ops, encode, **options)
    model.prepare(config.precision)
    return None


def _key(config: EngineConfig, model: CausalDiT) -> str:
    """Name of everything that the speed of a pass depends on."""
    about = {
        "gpu": torch.cuda.get_device_name(model.patch_embedding.weight.device),
        "torch": torch.__version__,
        "libraries": [gpu_library(), [library(name).__version__ for name in installed()]],
        "model": [str(config.model), str(model.dtype), config.precision.linears],
        "tokens": [config.memory.chunk_frames, config.grid],
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


@torch.inference_mode()
def pass_seconds(segments: Any, config: EngineConfig, model: CausalDiT, rounds: int = ROUNDS) -> float:
    """Median time of a pass through all segments without the attention between them, on a GPU from a captured graph."""
    run = one_pass(segments, config, model)
    device = model.patch_embedding.weight.device
    if device.type != "cuda":
        run()
        return median(_clock(run) for _ in range(rounds))
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    graph.replay()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize(device)

    torch.cuda.synchronize(device)
    return median(_clock(replay) for _ in range(rounds))


def one_pass(segments: Any, config: EngineConfig, model: CausalDiT) -> Callable[[], Tensor]:
    """A call that runs every segment once; each layer's query stands in for what its attention would give."""
    device, sizes = model.patch_embedding.weight.device, config.model
    shape = config.memory.chunk_frames, sizes.in_channels, config.video.latent_height, config.video.latent_width
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    modulation = model.modulate(float(config.sampler.steps[0]))
    kv = [
        torch.randn(sizes.text_len, sizes.heads, sizes.head_dim, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    ]
    cross = CrossCache(*(part.to(device, model.dtype) for part in kv), torch.zeros(sizes.text_len, device=device))

    def run() -> Tensor:
        x, (q, _, _) = segments.first(latents, modulation)
        for layer in range(segments.layers - 1):
            attended = q.unflatten(-1, (sizes.heads, sizes.head_dim))
            x, (q, _, _) = segments.middle(layer, x, attended, modulation, cross)
        return segments.last(x, q.unflatten(-1, (sizes.heads, sizes.head_dim)), modulation, cross)

    return run


def _clock(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
