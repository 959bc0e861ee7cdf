"""Exported graphs in TensorRT: plans on the GPU that share one workspace, and run on torch's stream.

Operands are checked and laid out by `Binding`, which ONNX Runtime shares; here are pointers, a stream and one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from cfengine.errors import DeviceError, ExportError
from cfengine.segments.binding import Bound, extent
from cfengine.segments.exported import SEGMENTS
from cfengine.segments.manifest import Graph, Manifest, write_whole
from cfengine.segments.tensorrt_library import kept_log, library
from cfengine.segments.tensorrt_plans import PlanFile, Plans

ALIGNMENT = 256  # bytes that an operand's address must be a multiple of; torch's allocations on a GPU are of 512
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # torch's names and TensorRT's


@dataclass(frozen=True)
class Loaded:
    """What loading took: plans, seconds, bytes of plans, of weights on the GPU, and of the workspace that all share."""

    plans: int
    seconds: float
    plan_bytes: int
    weight_bytes: int
    workspace_bytes: int


class _Running(NamedTuple):
    """An engine and its context, which must not outlive it."""

    engine: Any
    context: Any
    capturable: bool


class TensorRTRunner:
    """A `Runner` over plans that are loaded for one GPU.

    Contexts share a workspace as large as the largest of them asks for, since one stream runs them one after the other;
    that, and weights inside the engines, is all the memory they take. `execute_async_v3` only queues, so a CUDA graph
    captures it with the attention between two engines.
    """

    def __init__(
        self,
        manifest: Manifest,
        plans: Plans,
        device: torch.device | str,
        *,
        graphs: tuple[str, ...] = SEGMENTS,
        trt: ModuleType | None = None,
        stream: Callable[[], int] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Load the plans of some graphs.

        trt: the library (by default the one that the plans name)      stream: handle of the stream to run on (torch's
        current one)      progress(what, done, total): called before each plan
        Raises ExportError where a plan is not for this library, GPU or model, or not as it was written.
        """
        self.manifest, self.plans, self.device = manifest, plans, torch.device(device)
        self._trt = trt or library(plans.library)
        self._stream = stream or (lambda: torch.cuda.current_stream(self.device).cuda_stream)
        self._check_version()
        plans.check(manifest)
        begin = time.perf_counter()
        self._log = kept_log(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        self._cache: Any = None
        wanted = [(manifest.graph(n), i) for n in graphs for i in range(len(manifest.graph(n).weights))]
        self._running: dict[tuple[str, int], _Running] = {}
        for done, (graph, index) in enumerate(wanted):
            if progress:
                progress(f"{graph.name} {index}", done, len(wanted))
            self._running[graph.name, index] = self._open(graph, plans.file(graph.name, index))
        size = max((running.engine.device_memory_size_v2 for running in self._running.values()), default=0)
        self._workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        for running in self._running.values():
            running.context.set_device_memory(self._workspace.data_ptr(), size)
        files = [plans.file(graph.name, index) for graph, index in wanted]
        sizes = sum(file.bytes for file in files), sum(file.weight_bytes for file in files), size
        self.loaded = Loaded(len(files), time.perf_counter() - begin, *sizes)

    def run(self, graph: str, index: int, bound: Bound) -> None:
        """See `Runner.run`; queues the work on the stream and returns."""
        running = self._running.get((graph, index))
        if running is None:
            raise ExportError(f"plan of {graph} {index} is not loaded; name its graph when the runner is made")
        if not running.capturable and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ExportError(
                f"the plan of {graph} {index} cannot be captured in a CUDA graph, says {self._trt.__name__}; make the "
                "engine with graphs=False"
            )
        context = running.context
        operands = {name: aligned(tensor) for name, tensor in bound.inputs.items()} | bound.outputs
        for name, tensor in operands.items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(self._stream()):
            raise DeviceError(
                f"{self._trt.__name__} failed to run {graph} {index} of {self.plans.folder}: {self._told()}; "
                f"run {self.plans.command}"
            )

    def save_cache(self) -> None:
        """Keep the kernels that TensorRT-RTX compiled for this GPU beside the plans, for the next start."""
        data = bytes(self._cache.serialize()) if self._cache is not None else b""
        if data:
            with suppress(OSError):  # a folder that cannot be written to costs the next start some seconds
                write_whole(self.plans.cache, data)

    def _check_version(self) -> None:
        if (self._trt.__name__, self._trt.__version__) != (self.plans.library, self.plans.library_version):
            raise ExportError(
                f"{self.plans.folder} was built with {self.plans.library} {self.plans.library_version} and here is "
                f"{self._trt.__name__} {self._trt.__version__}; plans are of one version: run {self.plans.command}"
            )

    def _open(self, graph: Graph, file: PlanFile) -> _Running:
        engine = self._runtime.deserialize_cuda_engine(file.read(self.plans.command))
        if engine is None:
            raise ExportError(
                f"{file.path} does not load in {self._trt.__name__} {self._trt.__version__} on compute capability "
                f"{self.plans.capability}: {self._told()}; run {self.plans.command}"
            )
        self._check_operands(engine, graph, file.path)
        context = self._context(engine)
        if context is None:
            raise ExportError(f"{file.path} makes no context: {self._told()}; run {self.plans.command}")
        ask = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX alone has graphs that are not
        return _Running(engine, context, bool(ask(self._stream())) if ask else True)

    def _check_operands(self, engine: Any, graph: Graph, path: Path) -> None:
        """Hold an engine's operands against the graph's, so that a pointer is never taken for something else."""
        found = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        operands = {operand.name: operand for operand in (*graph.inputs, *graph.outputs)}
        if set(found) != set(operands):
            raise ExportError(
                f"{path} has operands {', '.join(sorted(found))} and {self.manifest.folder} says "
                f"{', '.join(sorted(operands))} for {graph.name!r}; run {self.plans.command}"
            )
        for name, operand in operands.items():
            expected = TYPES[operand.dtype], tuple(extent(dim, self.plans.symbols, name) for dim in operand.shape)
            got = engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name))
            if got != expected:
                raise ExportError(
                    f"{name} of {path} is {got[0]} {list(got[1])} and {self.manifest.folder} says {expected[0]} "
                    f"{list(expected[1])}; run {self.plans.command}"
                )

    def _context(self, engine: Any) -> Any:
        """A context that is given its workspace; those of TensorRT-RTX share one cache of compiled kernels."""
        by_user = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        if config is None or not hasattr(config, "create_runtime_cache"):
            return engine.create_execution_context(by_user)
        config.set_execution_context_allocation_strategy(by_user)
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self.plans.cache.is_file():
                self._cache.deserialize(self.plans.cache.read_bytes())  # of another driver or GPU: it starts empty
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def _told(self) -> str:
        """The last error that TensorRT logged, on one line."""
        return " ".join((self._log.errors or ["it does not say why"])[-1].split())[:600]


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it starts inside another at a place that kernels cannot read from."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
