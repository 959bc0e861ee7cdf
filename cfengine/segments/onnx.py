"""Exported graphs in ONNX Runtime, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfengine import checkpoint
from cfengine.errors import CheckpointError, ConfigError, ExportError
from cfengine.ops import Ops
from cfengine.segments.binding import Bound
from cfengine.segments.exported import SEGMENTS, GraphSegments
from cfengine.segments.manifest import Graph, Manifest


class OnnxRunner:
    """One session of ONNX Runtime for every graph and weight set that is asked for.

    Operands and weights are torch's own memory: sessions get pointers, and weights stay mapped from their files until
    ONNX Runtime lays them out for its products.
    """

    device = torch.device("cpu")

    def __init__(self, manifest: Manifest, threads: int | None = None) -> None:
        """threads: of each session; torch's number where not given."""
        self.manifest, self._ort = manifest, onnxruntime()
        if manifest.precision == "bf16":
            raise ExportError(
                f"{manifest.folder} is in bf16, for which ONNX Runtime's CPU provider has no matrix product; "
                f"run {manifest.command_in('fp32')}"
            )
        self._threads = threads or torch.get_num_threads()
        self._sessions: dict[tuple[str, int], tuple[Any, list[Tensor]]] = {}  # with the weights that they point to

    def load(self, names: tuple[str, ...] = SEGMENTS) -> None:
        """Open every session of these graphs now, so that the first pass does not pay for it."""
        for name in names:
            if name in self.manifest.graphs:
                for index in range(len(self.manifest.graph(name).weights)):
                    self._session(name, index)

    def run(self, graph: str, index: int, bound: Bound) -> None:
        """See `Runner.run`."""
        session = self._session(graph, index)
        binding = session.io_binding()
        try:
            for name, tensor in bound.inputs.items():
                binding.bind_input(name, "cpu", 0, _numpy_type(tensor), list(tensor.shape), tensor.data_ptr())
            for name, tensor in bound.outputs.items():
                binding.bind_output(name, "cpu", 0, _numpy_type(tensor), list(tensor.shape), tensor.data_ptr())
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises types of its own, all of them bare
            raise ExportError(f"graph {graph!r}, weights {index}, failed in ONNX Runtime: {error}") from error

    def _session(self, name: str, index: int) -> Any:
        if (name, index) not in self._sessions:
            self._sessions[name, index] = self._open(self.manifest.graph(name), index)
        return self._sessions[name, index][0]

    def _open(self, graph: Graph, index: int) -> tuple[Any, list[Tensor]]:
        """A session of a graph with one of its weight sets, and the tensors that must outlive it."""
        ort, folder, file = self._ort, self.manifest.folder, graph.weights[index]
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # what is worse than errors; those are raised
        # between two graphs torch's threads work: ONNX Runtime's must not wait by spinning
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            model = (folder / graph.file).read_bytes()
            weights = _wanted(model, checkpoint.read_tensors(folder / file))
            values = [ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for tensor in weights.values()]
            options.add_external_initializers(list(weights), values)
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except CheckpointError as error:
            raise ExportError(f"{error}; run {self.manifest.command}") from error
        except Exception as error:  # see `run`
            raise ExportError(
                f"ONNX Runtime {ort.__version__} does not take {folder / graph.file} with {file} ({error}); "
                f"update onnxruntime, or run {self.manifest.command}"
            ) from error
        return session, [*weights.values(), *values]


def onnx_segments(manifest: Manifest, ops: Ops, threads: int | None = None) -> GraphSegments:
    """Segments that ONNX Runtime runs, with every session open."""
    runner = OnnxRunner(manifest, threads)
    runner.load()
    return GraphSegments(manifest, runner, ops)


def onnxruntime() -> Any:
    """The package; ConfigError says how to get it."""
    try:
        import onnx  # noqa: F401 - it reads which weights a graph has
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"ONNX Runtime is not installed ({error}); pip install 'cfengine[export]'") from error
    return onnxruntime


def _wanted(model: bytes, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a graph uses: two graphs may share a file, and ONNX Runtime refuses what no operator reads."""
    import onnx

    names = {name for node in onnx.load_model_from_string(model).graph.node for name in node.input}
    return {name: tensor for name, tensor in weights.items() if name in names}


def _numpy_type(tensor: Tensor) -> Any:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
