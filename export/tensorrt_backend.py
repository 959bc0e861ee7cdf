"""Segments in TensorRT for an engine: plans from a folder or from the cache, built on first use; and their speed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
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
from cfengine.export.files import CACHES, locked
from cfengine.export.folder import Progress
from cfengine.export.graphs import OPSET
from cfengine.export.recipe import RECIPE
from cfengine.model.dit import CausalDiT, CrossCache
from cfengine.ops import Ops
from cfengine.scheduler.graphs import CudaRuntime
from cfengine.segments.choice import fastest
from cfengine.segments.exported import SEGMENTS, GraphSegments
from cfengine.segments.manifest import NAME as MANIFEST
from cfengine.segments.manifest import VERSION, Manifest, file_hash
from cfengine.segments.tensorrt import TensorRTRunner
from cfengine.segments.tensorrt_library import LIBRARIES, gpu_library, installed, library, on_gpu
from cfengine.segments.tensorrt_plans import NAME, Plans, command, describe
from cfengine.segments.torch import TorchSegments

PLANS = CACHES[0]
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

    folder, encode, progress: see `plans_for`
    Raises ExportError for a folder that is damaged or of other weights or sizes, ConfigError for what cannot run.
    """
    device = model.patch_embedding.weight.device
    if device.type != "cuda":
        raise ConfigError("backend 'tensorrt' runs on a GPU; choose device 'cuda', or backend 'torch'")
    with torch.cuda.device(device):  # TensorRT builds and loads for the current one
        manifest, plans = plans_for(config, model, encode, folder, progress)
        runner = TensorRTRunner(manifest, plans, device, progress=progress)
        segments = GraphSegments(manifest, runner, ops, fixed=plans.symbols)
        with torch.inference_mode():
            one_pass(segments, config, model)()  # TensorRT-RTX compiles kernels when they are first needed
        runner.save_cache()
    return segments


def plans_for(
    config: EngineConfig,
    model: CausalDiT,
    encode: Callable[[str], Tensor],
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, Plans]:
    """An export of a model, and its plans for the GPU at hand.

    folder: an export, whose plans are taken as they are (see `chosen`) and built where it has none for this GPU.
    Without one it is the cache's, made on first use, as are plans that are not of its graphs, weights and library
    encode: prompt -> embedding, for the calibration of fp8
    """
    if model.dtype != torch.bfloat16:
        kind = str(model.dtype).removeprefix("torch.")
        raise ConfigError(f"backend 'tensorrt' runs in bfloat16 and the model is in {kind}; load it in bfloat16")
    # what is exported are the weights as they are; TensorRT rounds them
    whole = replace(config, precision=replace(config.precision, linears="bf16"))
    manifest = open_folder(whole, model, folder, progress)
    precision = "fp8" if config.precision.linears == "fp8" else manifest.precision
    plans = chosen(manifest, precision) if folder is not None else None
    if plans is None:
        scales = _scales(config, model, encode, manifest, progress) if precision == "fp8" else None
        options = {"precision": precision, "calibration": scales, "graphs": SEGMENTS, "progress": progress}
        (plans,) = build(manifest.folder, target="current", **options)
    return manifest, plans


def chosen(manifest: Manifest, precision: str) -> Plans | None:
    """The plans of a folder that are to run where a configuration asks for a precision, None where some must be built.

    One precision that the folder has for this GPU is taken, since someone built it to be run; of several, the one that
    is asked for. Products that are to be rounded are not run unrounded: fp8 is built beside plans in bf16.
    Raises ConfigError where the folder has several, and not this one.
    """
    found = held(manifest)
    if precision in found or not found:
        return found.get(precision)
    if precision == "fp8":
        found.pop(manifest.precision, None)
    if len(found) > 1:
        raise ConfigError(
            f"{manifest.folder} has plans in {', '.join(found)} for this GPU and none in {precision}; keep one of them "
            f"alone in {manifest.folder / PLANS}, or run {command(manifest.folder, 'current', precision)}"
        )
    return next(iter(found.values()), None)


def held(manifest: Manifest) -> dict[str, Plans]:
    """Precision -> whole plans of an export for the GPU at hand; those built on it go before portable ones."""
    library, capability = gpu_library()
    gpu, found = torch.cuda.get_device_name(), {}
    for place in sorted((manifest.folder / PLANS).glob(f"*/{NAME}")):  # current comes before rtx
        about = describe(place.parent)
        fits = about.get("model", {}).get("hash") == manifest.model_hash and about.get("gpu") in ("", gpu)
        known = about.get("library", {}).get("name") in (library, "tensorrt_rtx")
        if fits and known and capability in about.get("targets", {}):
            plans = Plans.load(place.parent, capability)
            wanted = {(n, i) for n in SEGMENTS if n in manifest.graphs for i in range(len(manifest.graph(n).weights))}
            if wanted <= set(plans.files):
                found.setdefault(plans.precision, plans)
    return found


def _scales(config, model, encode, manifest: Manifest, progress: Progress | None) -> Calibration:
    """The folder's calibration, made first where there is none."""
    with locked(manifest.folder / CACHES[1]):  # plans of two processes are to be of the same scales
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

    best, gpu = "torch", model.patch_embedding.weight.device.type == "cuda"
    if gpu and installed():
        measures = {"tensorrt": tensorrt, "torch": plain}  # TensorRT first: it wants the weights as they are
        kept = cache_dir() / "backends.json"
        best = fastest(measures, kept, lambda: _key(config, model, ops, options.get("folder")))
    elif gpu:
        warnings.warn(
            f"backend 'auto' has torch alone to choose, without TensorRT; {' or '.join(LIBRARIES.values())}",
            stacklevel=2,
        )
    if best == "tensorrt":
        return opened[0] if opened else open_tensorrt(config, model, ops, encode, **options)
    model.prepare(config.precision)
    return None


def _key(config: EngineConfig, model: CausalDiT, ops: Ops, folder: str | Path | None) -> str:
    """Name of everything that the speed of a pass depends on."""
    device = model.patch_embedding.weight.device
    with on_gpu(device):
        at_hand = gpu_library()
    about = {
        "gpu": torch.cuda.get_device_name(device),
        "versions": [torch.__version__, importlib.metadata.version("cfengine")],
        "libraries": [at_hand, [library(name).__version__ for name in installed()]],
        "model": [str(config.model), str(model.dtype), str(config.precision)],
        "operations": sorted(ops.names.items()),
        "tokens": [config.memory.chunk_frames, config.grid],
        "plans": [OPSET, VERSION, RECIPE] if folder is None else _described(Path(folder)),
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _described(folder: Path) -> dict[str, str]:
    """Hashes of what a folder says of its export and of its plans."""
    told = [folder / MANIFEST, *sorted((folder / PLANS).glob(f"*/{NAME}"))]
    return {str(path): file_hash(path) for path in told if path.is_file()}


@torch.inference_mode()
def pass_seconds(segments: Any, config: EngineConfig, model: CausalDiT, rounds: int = ROUNDS) -> float:
    """Median time of a pass through all segments without the attention between them, on a GPU from a captured graph."""
    run = one_pass(segments, config, model)
    device = model.patch_embedding.weight.device
    if device.type != "cuda":
        run()
        return median(_clock(run) for _ in range(rounds))
    with CudaRuntime.apart:  # another engine may capture its graphs meanwhile
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # on which the operands were made
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
