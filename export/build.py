"""An export folder to TensorRT plans: every graph, every weight set, every GPU target, and a manifest written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cfengine.errors import ConfigError, ExportError
from cfengine.export.calibrate import Calibration
from cfengine.export.files import CACHES, locked, write
from cfengine.export.folder import Progress
from cfengine.export.graphs import onnx_package, with_weights
from cfengine.export.recipe import Recipe, plan_name
from cfengine.export.tensorrt import Plan, build_plan
from cfengine.export.tensorrt_graph import fixed, plain_attention
from cfengine.export.tensorrt_quantise import SCALED, quantised
from cfengine.segments.binding import extent
from cfengine.segments.exported import SEGMENTS
from cfengine.segments.manifest import Graph, Manifest
from cfengine.segments.tensorrt_library import gpu_library, library
from cfengine.segments.tensorrt_plans import FORMAT, NAME, VERSION, Plans, command, place

TARGETS = ("rtx", "current")
PRECISIONS = ("bf16", "fp16", *SCALED)
CAPABILITIES = ("8.6", "8.9", "12.0")  # of target rtx: GeForce RTX 30, 40 and 50
LEAST = {"fp8": (8, 9), "nvfp4": (12, 0)}  # compute capability whose tensor cores multiply the type
TIMINGS = "timing.cache"


def build(
    folder: str | Path,
    *,
    target: str = "rtx",
    precision: str = "bf16",
    calibration: Calibration | None = None,
    capabilities: Sequence[str] | None = None,
    graphs: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Plans]:
    """Build plans of an export; what an earlier run has built of the same graphs and weights is kept.

    target: "rtx" builds with TensorRT-RTX for CAPABILITIES, without a GPU; "current" for the GPU at hand, with TensorRT
    where it is installed, else with TensorRT-RTX      capabilities, graphs: some of them
    calibration: for fp8 and nvfp4      progress(what, done, total): called before each step
    -> one `Plans` a GPU target.  Raises ConfigError for what cannot be asked for, ExportError for what does not build
    and for files of the export that are not as they were written.
    """
    say = progress or (lambda what, done, total: None)
    manifest = Manifest.load(folder)
    with locked(manifest.folder / CACHES[0], lambda: say("waiting for another process that builds there", 0, 1)):
        return _build(Manifest.load(folder), target, precision, calibration, capabilities, graphs, say)


def _build(
    manifest: Manifest,
    target: str,
    precision: str,
    calibration: Calibration | None,
    capabilities: Sequence[str] | None,
    graphs: Sequence[str] | None,
    say: Progress,
) -> list[Plans]:
    trt, gpu = check_request(manifest, target, precision)
    _check_calibration(manifest, target, precision, calibration)
    recipe = Recipe(manifest, trt, target, precision, calibration, torch.cuda.get_device_name() if gpu else "")
    asked = [gpu] if gpu else list(capabilities or CAPABILITIES)
    skipped = {each: why for each in asked if (why := unserved(precision, each))}
    served = [each for each in asked if each not in skipped]
    if not served:
        raise ExportError(f"no target can serve {precision}: {'; '.join(f'{k}: {v}' for k, v in skipped.items())}")
    jobs = _jobs(manifest, graphs)
    steps = len(jobs) * len(served)
    entries: dict[str, dict[str, Any]] = {capability: {} for capability in served}
    for number, (graph, index) in enumerate(jobs):
        model = _Prepared(recipe, graph, index)
        for place_in_row, capability in enumerate(served):
            what = f"{plan_name(graph, index)} for {capability}"
            say(what, number * len(served) + place_in_row, steps)
            entries[capability][plan_name(graph, index)] = _entry(recipe, model, capability, what)
    say("done", steps, steps)
    _describe(recipe, entries, skipped)
    return [Plans.load(recipe.out, capability) for capability in served]


def _jobs(manifest: Manifest, graphs: Sequence[str] | None) -> list[tuple[Graph, int]]:
    """Graphs, and the weight sets of each; ExportError for a name that no graph has."""
    for name in graphs or ():
        if name not in SEGMENTS:  # one layer has no `middle`
            manifest.graph(name)
    wanted = [graph for graph in manifest.graphs.values() if graphs is None or graph.name in graphs]
    return [(graph, index) for graph in wanted for index in range(len(graph.weights))]


def unserved(precision: str, capability: str) -> str | None:
    """Why a GPU cannot serve a precision; None where it can."""
    least = LEAST.get(precision, (8, 0))
    if _number(capability) >= least:
        return None
    return f"{precision} needs compute capability {'.'.join(map(str, least))} or later"


def check_request(manifest: Manifest, target: str, precision: str) -> tuple[ModuleType, str | None]:
    """The library that serves a target, and the compute capability of the GPU at hand where that is the target.

    ConfigError for what cannot be asked for, before a calibration takes its time.
    """
    for what, value, known in (("target", target, TARGETS), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ConfigError(f"unknown {what} {value!r}; choose one of {', '.join(known)}")
    usable = (precision,) if precision not in SCALED else ("bf16", "fp16")
    if manifest.precision not in usable:
        raise ConfigError(
            f"{manifest.folder} is in {manifest.precision} and plans in {precision} are built from an export in "
            f"{' or '.join(usable)}; run {manifest.command_in(usable[0])}"
        )
    name, gpu = ("tensorrt_rtx", None) if target == "rtx" else gpu_library()
    return library(name), gpu


def _check_calibration(manifest: Manifest, target: str, precision: str, calibration: Calibration | None) -> None:
    if precision in SCALED and calibration is None:
        raise ConfigError(
            f"{precision} needs a calibration, the largest inputs of the model's products over real chunks; run "
            f"{command(manifest.folder, target, precision)}, which makes one"
        )
    if calibration is not None and calibration.model_hash != manifest.model_hash:
        raise ConfigError(
            f"the calibration is of weights {calibration.model_hash[:12]} and {manifest.folder} has "
            f"{manifest.model_hash[:12]}; calibrate with the model that was exported"
        )


class _Prepared:
    """A graph with one of its weight sets, made ready for TensorRT when it is first asked for."""

    def __init__(self, recipe: Recipe, graph: Graph, index: int) -> None:
        self.recipe, self.graph, self.index = recipe, graph, index
        self._made: tuple[bytes, dict[str, str]] | None = None

    def get(self) -> tuple[bytes, dict[str, str]]:
        """The serialised model, and its products: node -> weight."""
        if self._made is None:
            onnx, recipe = onnx_package(), self.recipe
            recipe.manifest.verify([self.graph.file, self.graph.weights[self.index]])
            model = with_weights(recipe.manifest, self.graph.name, self.index)
            onnx.load_external_data_for_model(model, str(recipe.manifest.folder))
            plain_attention(fixed(model, recipe.symbols))
            products = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
            largest = recipe.largest(self.graph.name, self.index)
            if largest:
                quantised(model, recipe.precision, largest)
            self._made = model.SerializeToString(), products
        return self._made


def _entry(recipe: Recipe, model: _Prepared, capability: str, what: str) -> dict[str, Any]:
    """What the manifest says of a plan, which is built unless it is there already."""
    name = plan_name(model.graph, model.index)
    folder = recipe.out / place(capability)
    key = recipe.key(model.graph, model.index, capability)
    note = folder / f"{name}.json"
    kept = _kept(note, folder, key)
    if kept:
        return kept
    data, products = model.get()
    timings = folder / TIMINGS
    plan = build_plan(
        recipe.trt, data, what, capability if recipe.target == "rtx" else None,
        cache=timings.read_bytes() if timings.is_file() else b"",
    )  # fmt: skip
    entry = _about(model, plan, f"{name}.plan", products) | {"key": key}
    write(folder / f"{name}.plan", plan.data)
    if plan.cache:
        write(timings, plan.cache)
    write(note, json.dumps(entry).encode())
    return entry


def _about(model: _Prepared, plan: Plan, path: str, products: dict[str, str]) -> dict[str, Any]:
    computed, files = plan.contents.products(), model.recipe.manifest.files
    return {
        "graph": model.graph.name,
        "index": model.index,
        "path": path,
        "bytes": len(plan.data),
        "sha256": hashlib.sha256(plan.data).hexdigest(),
        "weight_bytes": plan.contents.weight_bytes,
        "workspace_bytes": plan.contents.workspace_bytes,
        "products": {weight: computed.get(node, "unknown") for node, weight in products.items()},
        "layers": len(plan.contents.layers),
        "seconds": round(plan.seconds, 3),
        "onnx_sha256": files[model.graph.file]["sha256"],
        "weights_sha256": files[model.graph.weights[model.index]]["sha256"],
    }


def _kept(note: Path, folder: Path, key: str) -> dict[str, Any] | None:
    """What an earlier run noted of a plan with the same key, if the plan is still as it was written."""
    try:
        entry = json.loads(note.read_text(encoding="utf-8"))
        data = (folder / entry["path"]).read_bytes()
    except (OSError, ValueError, LookupError):
        return None
    whole = entry.get("key") == key and hashlib.sha256(data).hexdigest() == entry["sha256"]
    return entry if whole else None


def _describe(recipe: Recipe, entries: dict[str, dict[str, Any]], skipped: dict[str, str]) -> None:
    """Write the description: these plans, and those of earlier builds that are still of the same inputs."""
    manifest, trt = recipe.manifest, recipe.trt
    targets, left_out = _earlier(recipe)
    for capability, plans in entries.items():
        targets[capability] = targets.get(capability, {}) | plans
    shown = sorted({entry["graph"] for plans in targets.values() for entry in plans.values()})
    about = {
        "format": FORMAT,
        "version": VERSION,
        "command": command(manifest.folder, recipe.target, recipe.precision),
        "library": {"name": trt.__name__, "version": trt.__version__},
        "model": {"name": manifest.model_name, "hash": manifest.model_hash},
        "target": recipe.target,
        "gpu": recipe.gpu,
        "precision": recipe.precision,
        "calibration": recipe.calibration and recipe.calibration.made_from,
        "symbols": recipe.symbols,
        "graphs": {name: dict(_shapes(manifest.graph(name), recipe.symbols)) for name in shown},
        "targets": {capability: {"plans": targets[capability]} for capability in sorted(targets, key=_number)},
        "skipped": {capability: why for capability, why in (left_out | skipped).items() if capability not in targets},
    }
    write(recipe.out / NAME, json.dumps(about, indent=1).encode())


def _earlier(recipe: Recipe) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Plans that earlier builds described, by capability and name, and what they left out.

    Those of other graphs, weights, scales or libraries are not told of any more: their keys say so.
    """
    try:
        found = json.loads((recipe.out / NAME).read_text(encoding="utf-8"))
        targets = {
            capability: {name: entry for name, entry in about["plans"].items() if recipe.holds(entry, capability)}
            for capability, about in found["targets"].items()
        }
        return {capability: plans for capability, plans in targets.items() if plans}, dict(found["skipped"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}, {}  # there is none, or none that can be read: what is built now is whole in itself


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def _shapes(graph: Graph, symbols: dict[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("inputs", "outputs"):
        yield kind, {o.name: [o.dtype, [extent(dim, symbols, o.name) for dim in o.shape]] for o in getattr(graph, kind)}
