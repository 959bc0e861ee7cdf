"""Backends that run the segments, side by side: time and error of each segment, and of a whole chunk.

    python -m cfengine.bench.segments --json FILE
    python -m cfengine.bench.segments --device cpu --size toy
    python -m cfengine.bench.segments --layers 2 --backends eager,tensorrt      (a model cut short builds in seconds)
    python -m cfengine.bench.segments --folder DIR      (keeps the export and its plans there for the next run)

torch is this engine's own segments with its kernels, eager the plain torch operations one by one, compile the same
through torch.compile; onnxruntime runs on a processor, tensorrt on a GPU, in the export's own precision and in those
that a name adds. All start from the same random weights, in float32 on a processor and in bfloat16 on a GPU. An error
is the root mean square of the difference to eager torch in float32, over its root mean square. A backend that cannot
run is a record without a value that says why.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfengine.bench import command
from cfengine.bench.command import Say, several
from cfengine.bench.records import record
from cfengine.bench.synthetic import SIZES, chosen, describe, prompt_tokens, random_weights
from cfengine.bench.timing import Times, difference, measure
from cfengine.config import EngineConfig
from cfengine.errors import CFEngineError, ConfigError
from cfengine.memory.memory import Memory
from cfengine.model.dit import CausalDiT, CrossCache, Modulation
from cfengine.ops import Ops, select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.program import ChunkProgram
from cfengine.scheduler.sampler import Schedule, chunk_noise
from cfengine.segments.torch import TorchSegments

TENSORRT = {"tensorrt": None, "tensorrt_fp8": "fp8", "tensorrt_nvfp4": "nvfp4"}  # -> precision; None: the export's
BACKENDS = ("eager", "torch", "compile", "onnxruntime", *TENSORRT)
BASELINE = "eager"
SEGMENTS = ("first", "middle", "last")
PORTABLE = 0.1  # bf16 keeps 8 bits, which a segment rounds to some ten times: a right plan is off by a percent or two


@dataclass(frozen=True)
class Setup:
    """What every backend shares. model: in the type that is timed      wide: the same weights in float32"""

    config: EngineConfig
    device: torch.device
    model: CausalDiT
    wide: CausalDiT
    folder: Path

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @classmethod
    def of(cls, config: EngineConfig, device: str, folder: Path) -> Setup:
        """Random weights, made on the device."""
        weights = random_weights(config.model, device=device)
        kind = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        models = []
        for dtype in (kind, torch.float32):
            with torch.device("meta"):
                model = CausalDiT(config.model)
            model.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
            models.append(model.prepare())
        return cls(config, torch.device(device), *models, folder)

    def normal(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)


def plain_ops(device: torch.device) -> Ops:
    """Every operation in plain torch."""
    return select(device.type, prefer="reference")


def opened(setup: Setup, backend: str) -> Any:
    """Segments of a backend; an error of this package says why there are none."""
    config, model, device = setup.config, setup.model, setup.device
    if backend in ("eager", "torch"):
        ops = chosen(config, device) if backend == "torch" else plain_ops(device)
        return TorchSegments(model, ops, config.grid)
    if backend == "compile":
        return Compiled(model, plain_ops(device), config.grid)
    if backend in TENSORRT and device.type == "cpu":
        raise ConfigError(f"backend {backend!r} runs on a GPU; run with --device cuda")
    if backend in TENSORRT:
        return in_tensorrt(setup, TENSORRT[backend])
    from cfengine.export.backend import open_onnx

    exported(setup)
    return open_onnx(config, model, chosen(config, device), folder=setup.folder)


def exported(setup: Setup) -> Any:
    """Manifest of the model's export, which is made first where there is none."""
    from cfengine.export.backend import open_folder
    from cfengine.export.folder import export
    from cfengine.segments.manifest import NAME, PRECISIONS

    if not (setup.folder / NAME).exists():
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == setup.dtype)
        export(setup.config, setup.model, setup.folder, precision=precision, graphs=SEGMENTS)
    return open_folder(setup.config, setup.model, setup.folder)


def in_tensorrt(setup: Setup, precision: str | None = None) -> Any:
    """Segments from the plans that the export holds in a precision for this GPU; where it has none they are built."""
    from cfengine.export.build import SCALED, build
    from cfengine.export.calibrate import Calibration, calibrate
    from cfengine.export.tensorrt_backend import held
    from cfengine.segments.exported import GraphSegments
    from cfengine.segments.tensorrt import TensorRTRunner
    from cfengine.segments.tensorrt_library import on_gpu

    manifest = exported(setup)
    precision = precision or manifest.precision
    with on_gpu(setup.device):
        plans = held(manifest).get(precision)
        if plans is None:
            scales = Calibration.load(manifest.folder, manifest.model_hash) if precision in SCALED else None
            if precision in SCALED and scales is None:
                rows = setup.normal(prompt_tokens(setup.config), setup.config.model.text_dim, seed=5, dtype=setup.dtype)
                scales = calibrate(setup.config, setup.model, lambda prompt: rows, manifest.model_hash)
                scales.save(manifest.folder)
            options = {"precision": precision, "calibration": scales, "graphs": SEGMENTS}
            (plans,) = build(manifest.folder, target="current", **options)
    runner = TensorRTRunner(manifest, plans, setup.device)
    return GraphSegments(manifest, runner, chosen(setup.config, setup.device), plans.symbols)


class Compiled(TorchSegments):
    """Segments through torch.compile, each as one function."""

    def __init__(self, model: CausalDiT, ops: Ops, grid: tuple[int, int]) -> None:
        super().__init__(model, ops, grid)
        for name in SEGMENTS:
            setattr(self, name, torch.compile(getattr(super(), name), dynamic=False))


def calls(setup: Setup, segments: Any, dtype: torch.dtype, model: CausalDiT) -> dict[str, Callable[[], list[Tensor]]]:
    """A call of each segment on fixed operands, which it leaves as they are; -> its results."""
    config, sizes = setup.config, setup.config.model
    tokens = config.memory.chunk_frames * config.page_tokens
    latents = setup.normal(*latent_shape(config), seed=0)
    x = setup.normal(tokens, sizes.dim, seed=1, dtype=dtype)
    attended = setup.normal(tokens, sizes.heads, sizes.head_dim, seed=2, dtype=dtype)
    kv = (setup.normal(sizes.text_len, sizes.heads, sizes.head_dim, seed=s, dtype=dtype) for s in (3, 4))
    cross = CrossCache(*kv, torch.zeros(sizes.text_len, device=setup.device))
    modulation: Modulation = model.modulate(float(config.sampler.steps[0]))
    found = {
        "first": lambda: flat(segments.first(latents, modulation)),
        "middle": lambda: flat(segments.middle(0, x.clone(), attended, modulation, cross)),
        "last": lambda: [segments.last(x.clone(), attended, modulation, cross)],
    }
    return found if sizes.layers > 1 else {name: found[name] for name in ("first", "last")}


def flat(found) -> list[Tensor]:
    x, projected = found
    return [x, *projected]


def latent_shape(config: EngineConfig) -> tuple[int, int, int, int]:
    video = config.video
    return config.memory.chunk_frames, config.model.in_channels, video.latent_height, video.latent_width


def program(setup: Setup, segments: Any, dtype: torch.dtype, model: CausalDiT) -> ChunkProgram:
    """The passes of a chunk around these segments, prompt and noise in place."""
    config = setup.config
    memory = Memory(config, segments.ops, dtype, setup.device)
    made = ChunkProgram(ChunkScheduler(model, segments, Schedule(config.sampler)), config, [memory])
    prompt = setup.normal(prompt_tokens(config), config.model.text_dim, seed=5, dtype=dtype)
    made.set(0, 0, False, model.project_text(prompt))
    frames, *shape = latent_shape(config)
    for step in range(len(config.sampler.steps)):
        made.noise[step].copy_(chunk_noise(0, 0, frames, step, tuple(shape)))
    return made


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The worst of several results; not a number where one of them holds what is none, which max would pass over."""
    found = [difference(mine, other)[1] for mine, other in zip(got, want, strict=True)]
    return next((off for off in found if math.isnan(off)), max(found))


@torch.inference_mode()
def measured(setup: Setup, segments: Any, expected: dict[str, list[Tensor]], seconds: float):
    """(part, time, error) of each segment, and of a chunk: 4 denoise passes and the clean one."""
    graph = setup.device.type == "cuda"
    for name, call in calls(setup, segments, setup.dtype, setup.model).items():
        off = error(call(), expected[name])
        yield name, measure([call], setup.device, seconds=seconds, graph=graph), off
    chunk = program(setup, segments, setup.dtype, setup.model)
    chunk.denoise()
    off = error([chunk.x0], expected["chunk"])

    def whole() -> None:
        chunk.denoise()
        chunk.clean()

    yield "chunk", measure([whole], setup.device, seconds=seconds, graph=graph), off


@torch.inference_mode()
def reference(setup: Setup) -> dict[str, list[Tensor]]:
    """Results in float32."""
    segments = TorchSegments(setup.wide, plain_ops(setup.device), setup.config.grid)
    found = {name: call() for name, call in calls(setup, segments, torch.float32, setup.wide).items()}
    chunk = program(setup, segments, torch.float32, setup.wide)
    chunk.denoise()
    return found | {"chunk": [chunk.x0.clone()]}


def work(options, say: Say) -> Iterator[list[dict]]:
    config = SIZES[options.size]
    if options.layers is not None:
        config = replace(config, model=replace(config.model, layers=options.layers))
    backends = several(options.backends, BACKENDS, "backend")
    if options.seconds <= 0:
        raise ConfigError(f"--seconds is {options.seconds}; give a time above 0")
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup.of(config, options.device, options.folder or Path(folder) / "export")
        expected = reference(setup)
        base: dict[str, float] = {}
        for backend in sorted(backends, key=lambda name: name != BASELINE):
            say(f"{backend} ...")
            yield list(of_backend(setup, backend, expected, base, options.seconds))
        if setup.device.type == "cuda" and TENSORRT.keys() & set(backends):
            yield list(portable(setup, expected["first"]))


def of_backend(setup: Setup, backend: str, expected, base: dict[str, float], seconds: float) -> Iterator[dict]:
    """Records of a backend; base: times of the baseline, which come first."""
    shape = describe(setup.config, dtype=str(setup.dtype).removeprefix("torch."), backend=backend)
    try:
        segments = opened(setup, backend)
        loaded = getattr(getattr(segments, "runner", None), "loaded", None)
        if loaded is not None:
            sizes = {name: value for name, value in asdict(loaded).items() if name != "seconds"}
            sizes["precision"] = segments.runner.plans.precision
            yield record(f"segments_load_{backend}", loaded.seconds, "s", config=shape | sizes)
        for part, times, off in measured(setup, segments, expected, seconds):
            yield entry(part, backend, times, off, base, shape)
    except Exception as failed:  # torch.compile raises its own; the other backends are measured all the same
        if isinstance(failed, CFEngineError) or backend == "compile":
            yield record(f"segments_{backend}", None, "s", config=shape | {"reason": reason(failed)})
        else:
            raise


def entry(part: str, backend: str, times: Times, off: float, base: dict[str, float], shape: dict) -> dict:
    if backend == BASELINE:
        base[part] = times.median
    ratio = base[part] / times.median if part in base and backend != BASELINE else None
    more = {"relative_error": off, "low": times.low, "high": times.high, "samples": times.count, "how": times.how}
    return record(
        f"segments_{part}_{backend}", times.median, "s", baseline=ratio and BASELINE, ratio=ratio, config=shape | more
    )


@torch.inference_mode()
def portable(setup: Setup, expected: list[Tensor]) -> Iterator[dict]:
    """Whether this GPU runs TensorRT-RTX engines that were built for others: 1 or 0, and why not."""
    from cfengine.export.build import CAPABILITIES, build
    from cfengine.segments.exported import GraphSegments
    from cfengine.segments.tensorrt import TensorRTRunner

    manifest = exported(setup)
    for capability in CAPABILITIES:
        found, why = 0.0, ""
        try:
            (plans,) = build(setup.folder, capabilities=[capability], graphs=["first"])
            runner = TensorRTRunner(manifest, plans, setup.device, graphs=("first",))
            segments = GraphSegments(manifest, runner, chosen(setup.config, setup.device), plans.symbols)
            off = error(calls(setup, segments, setup.dtype, setup.model)["first"](), expected)
            found = float(off < PORTABLE)
            why = "" if found else f"it runs, and its results are {off:.2g} off"
        except (CFEngineError, RuntimeError) as refused:
            why = reason(refused)
        yield record(f"portable_plan_sm{capability.replace('.', '')}", found, "runs", config={"reason": why})


def reason(failed: Exception) -> str:
    """An error on one line, cut short."""
    return " ".join(str(failed).split())[:400]


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = command.parser("segments", "time and error of each backend's segments")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="of the model, fewer than it has")
    parser.add_argument("--folder", type=Path, help="of the export and its plans; default: one that is deleted")
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing a row")
    return command.run(parser.parse_args(arguments), work)


if __name__ == "__main__":
    sys.exit(main())
