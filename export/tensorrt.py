"""One ONNX graph to one TensorRT plan."""

from __future__ import annotations

import time
from types import ModuleType
from typing import NamedTuple

from cfengine.errors import ExportError
from cfengine.export.tensorrt_layers import Contents, contents
from cfengine.segments.tensorrt_library import kept_log

WORKSPACE = 4 << 30  # bytes of scratch memory that a tactic may ask for; engines share the largest


class Plan(NamedTuple):
    """A built engine. data: what a runtime loads      cache: timings of tactics, empty where nothing was timed"""

    data: bytes
    contents: Contents
    seconds: float
    cache: bytes


def build_plan(
    trt: ModuleType,
    graph: bytes,
    name: str,
    capability: str | None = None,
    *,
    cache: bytes = b"",
) -> Plan:
    """Parse a serialised ONNX model and build a strongly typed engine: every type is the one in the graph.

    graph: with its weights inside and no open shapes      cache: timings of an earlier build (TensorRT)
    capability: "8.6", "8.9" or "12.0", without a GPU (TensorRT-RTX); None builds for the GPU at hand
    Raises ExportError, in which `name` says what was to be built, with what TensorRT has against it.
    """
    log, begin = kept_log(trt), time.perf_counter()
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        told = [parser.get_error(i) for i in range(parser.num_errors)]
        nodes = "; ".join(f"{e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in told)
        raise ExportError(
            f"{name} does not parse in {_version(trt)}: {nodes or _told(log)}; export it again with this version of "
            "cfengine, or build it with another precision"
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.max_aux_streams = 0  # kernels follow one another on the stream of the caller, whose graph captures them
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of layers, and of the ONNX nodes they compute
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX; memory taken while it runs ends a capture
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    timings = _target(trt, config, capability, cache)
    data = builder.build_serialized_network(network, config)
    if data is None:
        where = f"compute capability {capability}" if capability else "the GPU at hand"
        raise ExportError(
            f"{_version(trt)} builds no engine of {name} for {where}: {_told(log)}; choose another target or precision"
        )
    kept = b"" if timings is None else bytes(config.get_timing_cache().serialize())
    return Plan(bytes(data), contents(log.lines), time.perf_counter() - begin, kept)


def _target(trt: ModuleType, config, capability: str | None, cache: bytes):
    """Say which GPU the engine is for; -> the timing cache where tactics are timed on the GPU at hand."""
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        word = f"SM{capability.replace('.', '')}" if capability else "CURRENT"
        config.set_compute_capability(getattr(trt.ComputeCapability, word), 0)
        return None
    timings = config.create_timing_cache(cache)
    # timings of another GPU would choose other tactics than those that are fast here: such a cache is refused, and left
    if timings is None or config.set_timing_cache(timings, ignore_mismatch=False) is False:
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _version(trt: ModuleType) -> str:
    return f"{trt.__name__} {trt.__version__}"


def _told(log) -> str:
    """The last error in a log, on one line."""
    return " ".join((log.errors or ["it does not say why"])[-1].split())[:600]
