"""Exported graphs in TensorRT: plans on the GPU that share one workspace, and run on torch's stream.

Operands are checked and laid out by `Binding`, which ONNX Runtime shares; here are pointers, a stream and one call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from cfengine.errors import DeviceError, ExportError
from cfengine.segments.binding import Bound, extent, placed
from cfengine.segments.exported import SEGMENTS
from cfengine.segments.manifest import Graph, Manifest, write_whole
from cfengine.segments.tensorrt_library import kept_log, library, on_gpu
from cfengine.segments.tensorrt_plans import PlanFile, Plans

ALIGNMENT = 256  # bytes that addresses of operands and of workspace must be multiples of
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # torch's names and TensorRT's
MESSAGES = 100  # of TensorRT's that a runner keeps: more than one failure tells, and a bound for one that runs for days


@dataclass(frozen=True)
class Loaded:
    """What loading took: plans, seconds, bytes of plans, of weights on the GPU, and of the workspace that all share."""

    plans: int
    seconds: float
    plan_bytes: int
    weight_bytes: int
    workspace_bytes: int

    def __str__(self) -> str:
        weights, workspace = self.weight_bytes / 1e6, self.workspace_bytes / 1e6
        memory = f"{weights:.1f} MB of weights, {workspace:.1f} MB of workspace"
        return f"{self.plans} plans loaded in {self.seconds:.1f} s: {memory}"


class _Running(NamedTuple):
    """An engine, its context, and what the context was made with. They are let go from the last to the first."""

    config: Any
    engine: Any
    context: Any


class TensorRTRunner:
    """A `Runner` over plans that are loaded for one GPU, which need not be CUDA's current one.

    Contexts share a workspace as large as the largest of them asks for, since one stream runs them one after the other;
    that, and weights inside the engines, is all the memory they take. `execute_async_v3` only queues, so a CUDA graph
    captures it with the attention between two engines. Threads may share a runner, but not run it on two streams.
    """

    def __init__(
        self,
        manifest: Manifest,
        plans: Plans,
        device: torch.device | str,
        *,
        graphs: tuple[str, ...] | None = None,
        trt: ModuleType | None = None,
        stream: Callable[[], int] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Load the plans of some graphs (those segments that there are).

        trt: the library (by default the one that the plans name)      stream: handle of the stream to run on (torch's
        current one)      progress(what, done, total): called before each plan, and at the end, with what loading took
        Raises ExportError where a plan is not for this library, GPU or model, or not as it was written, DeviceError
        where the GPU has no memory left for the workspace.
        """
        self.manifest, self.plans, self.device = manifest, plans, placed(device)
        self._trt = trt or library(plans.library)
        self._stream = stream or (lambda: torch.cuda.current_stream(self.device).cuda_stream)
        self._check_version()
        plans.check(manifest)
        self._log = kept_log(self._trt, MESSAGES)
        self._lock = threading.Lock()
        self._cache: Any = None
        self._running: dict[tuple[str, int], _Running] = {}
        self._capturable: dict[tuple[str, int], int] = {}  # plan -> a stream of which it said that it can be captured
        names = graphs or tuple(name for name in SEGMENTS if name in manifest.graphs)
        say = progress or (lambda what, done, total: None)
        with on_gpu(self.device):
            self.loaded = self._load([manifest.graph(name) for name in names], say)

    def run(self, graph: str, index: int, bound: Bound) -> None:
        """See `Runner.run`; queues the work on the stream and returns."""
        running = self._running.get((graph, index))
        if running is None:
            raise ExportError(f"plan of {graph} {index} is not loaded; name its graph when the runner is made")
        with self._lock, on_gpu(self.device):  # a context has one set of addresses
            self._log.errors.clear()  # those of calls that went well all the same
            stream = self._stream()
            inputs = {name: aligned(tensor) for name, tensor in bound.inputs.items()}
            for name, tensor in (inputs | bound.outputs).items():
                if not running.context.set_tensor_address(name, tensor.data_ptr()):
                    raise ExportError(
                        f"{self._trt.__name__} refuses the address of {name}, {list(tensor.shape)} at "
                        f"{tensor.data_ptr():#x}, for {graph} {index} of {self.plans.folder}: {self._told()}; "
                        f"run {self.plans.command}"
                    )
            self._check_capture(graph, index, stream)
            if not running.context.execute_async_v3(stream):
                raise DeviceError(
                    f"{self._trt.__name__} failed to run {graph} {index} of {self.plans.folder}: {self._told()}; "
                    f"run {self.plans.command}"
                )

    def save_cache(self) -> None:
        """Keep the kernels that TensorRT-RTX compiled for this GPU beside the plans, for the next start."""
        if self._cache is None:
            return
        with on_gpu(self.device):
            data = bytes(self._cache.serialize())
        if data:
            with suppress(OSError):  # a folder that cannot be written to costs the next start some seconds
                write_whole(self.plans.cache, data)

    def _load(self, graphs: list[Graph], say: Callable[[str, int, int], None]) -> Loaded:
        """Open every plan of these graphs, and give all of them the same workspace."""
        begin = time.perf_counter()
        self._runtime = self._trt.Runtime(self._log)
        wanted = [(graph, index) for graph in graphs for index in range(len(graph.weights))]
        files = [self.plans.file(graph.name, index) for graph, index in wanted]
        for done, ((graph, index), file) in enumerate(zip(wanted, files, strict=True)):
            say(f"{graph.name} {index}", done, len(wanted))
            self._running[graph.name, index] = self._open(graph, file)
        size = max((running.engine.device_memory_size_v2 for running in self._running.values()), default=0)
        address = self._allocate(size)
        for running in self._running.values():
            running.context.set_device_memory(address, size)
        sizes = sum(file.bytes for file in files), sum(file.weight_bytes for file in files), size
        loaded = Loaded(len(files), time.perf_counter() - begin, *sizes)
        say(str(loaded), len(wanted), len(wanted))
        return loaded

    def _allocate(self, size: int) -> int:
        """Allocate the workspace, which lives as long as the runner; -> its address, aligned."""
        try:
            self._workspace = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.device} has no {size / 1e6:.0f} MB left for the workspace of {self.plans.folder}; close other "
                "engines or programs on this GPU, or choose backend 'torch'"
            ) from error
        return -(-self._workspace.data_ptr() // ALIGNMENT) * ALIGNMENT

    def _check_capture(self, graph: str, index: int, stream: int) -> None:
        """Raise ExportError in a capture that TensorRT-RTX, whose plans may allocate, says cannot hold this plan.

        The answer is for one stream and for a context that has its memory and addresses. So it is asked for here, in
        the runs that warm a stream up before it captures, and a yes is kept: a capture then asks nothing.
        """
        ask = getattr(self._running[graph, index].context, "is_stream_capturable", None)
        if ask is None or self._capturable.get((graph, index)) == stream:
            return
        if ask(stream):
            self._capturable[graph, index] = stream
        elif capturing(self.device):
            raise ExportError(
                f"the plan of {graph} {index} cannot be captured in a CUDA graph, says {self._trt.__name__}; make the "
                "engine with graphs=False"
            )

    def _check_version(self) -> None:
        if (self._trt.__name__, self._trt.__version__) != (self.plans.library, self.plans.library_version):
            raise ExportError(
                f"{self.plans.folder} was built with {self.plans.library} {self.plans.library_version} and here is "
                f"{self._trt.__name__} {self._trt.__version__}; plans are of one version: run {self.plans.command}"
            )

    def _open(self, graph: Graph, file: PlanFile) -> _Running:
        self._log.errors.clear()
        engine = self._runtime.deserialize_cuda_engine(file.read(self.plans.command))
        if engine is None:
            raise ExportError(
                f"{file.path} does not load in {self._trt.__name__} {self._trt.__version__} on compute capability "
                f"{self.plans.capability}: {self._told()}; run {self.plans.command}"
            )
        self._check_operands(engine, graph, file.path)
        running = self._context(engine)
        if running.context is None:
            raise ExportError(f"{file.path} makes no context: {self._told()}; run {self.plans.command}")
        return running

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

    def _context(self, engine: Any) -> _Running:
        """A context that is given its workspace; those of TensorRT-RTX share one cache of compiled kernels."""
        by_user = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        if config is None or not hasattr(config, "create_runtime_cache"):
            return _Running(None, engine, engine.create_execution_context(by_user))
        config.set_execution_context_allocation_strategy(by_user)
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):  # there is none yet, or none that can be read: it starts empty
                self._cache.deserialize(self.plans.cache.read_bytes())  # as it does where that is of another GPU
        config.set_runtime_cache(self._cache)
        return _Running((config, self._cache), engine, engine.create_execution_context(config))

    def _told(self) -> str:
        """The last error that TensorRT logged, on one line."""
        return " ".join((self._log.errors or ["it does not say why"])[-1].split())[:600]


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it starts inside another at a place that kernels cannot read from."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def capturing(device: torch.device) -> bool:
    """Whether what is queued on torch's stream goes into a CUDA graph that is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
