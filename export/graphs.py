"""From a part of the model to an ONNX graph whose weights lie in safetensors files beside it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfengine.errors import ConfigError, ExportError
from cfengine.export.parts import Part, Port
from cfengine.segments.binding import extent, factored
from cfengine.segments.manifest import Manifest

OPSET = 23  # Attention and RMSNormalization are single operators from here on; ONNX Runtime 1.23 and later runs it
DOMAINS = {"", "ai.onnx"}  # standard operators
EXAMPLE = {"keys": 5, "sessions": 2}  # sizes while tracing, where a dimension is open


class _Called(nn.Module):
    """A module as a function of its operands and of its weights.

    Weights that are operands are neither folded into constants nor merged where two happen to be equal, so that one
    graph serves the weights of every layer.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self._call, self._names = (module,), names  # in a tuple, or its parameters would be this module's

    def forward(self, inputs: list[Tensor], weights: list[Tensor]) -> Any:
        named = dict(zip(self._names, weights, strict=True))
        return torch.func.functional_call(self._call[0], named, tuple(inputs))


@torch.inference_mode(False)  # the exporter keeps counts of changes, which inference tensors have not
def trace(part: Part) -> Any:
    """Export a part: an `onnx.ModelProto` whose inputs are the operands and then the weights, by name."""
    onnx = onnx_package()
    weights = [(name, torch.zeros_like(tensor)) for name, tensor in part.weights[0]().items()]
    symbols = {name: EXAMPLE[name] for name in _symbols(part)}
    open_dims = {name: torch.export.Dim(name, min=2 if name == "keys" else 1) for name in symbols}
    inputs = [_example(name, port, symbols) for name, port in part.inputs.items()]
    shapes = [_open(port, open_dims) for port in part.inputs.values()]
    try:
        with _quiet():
            program = torch.onnx.export(
                _Called(part.module, [name for name, _ in weights]).eval(),
                (inputs, [tensor for _, tensor in weights]),
                dynamo=True,
                opset_version=OPSET,
                input_names=[*part.inputs, *(name for name, _ in weights)],
                output_names=list(part.outputs),
                dynamic_shapes=(shapes, [None] * len(weights)) if symbols else None,
                verbose=False,
            )
    except Exception as error:  # the exporter raises its own, torch's and the system's errors
        raise ExportError(
            f"{part.name} does not export to ONNX opset {OPSET} ({_root(error)}); use standard torch operations in it, "
            "or the versions of torch and onnxscript in constraints.txt"
        ) from error
    proto = program.model_proto
    check_domains(part.name, proto)
    _name_shapes(onnx, proto, part)
    _forget_sources(proto)
    return proto


def check_domains(name: str, proto: Any) -> None:
    """Raise ExportError where a graph has operators beyond the standard ones."""
    strange = sorted({f"{node.domain}::{node.op_type}" for node in _nodes(proto.graph) if node.domain not in DOMAINS})
    functions = [function.name for function in proto.functions]
    if strange or functions:
        raise ExportError(
            f"graph {name!r} has {', '.join(strange + functions)}, which are no standard ONNX operators; "
            "write that part with operations that torch.onnx translates"
        )


def _nodes(graph: Any):
    """Nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _nodes(inner)


def externalise(proto: Any, weights: dict[str, Tensor], file: Path) -> None:
    """Turn the graph's weight inputs into initializers that lie in a safetensors file."""
    onnx = onnx_package()
    places = _places(file)
    kept = [value for value in proto.graph.input if value.name not in weights]
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    for name, tensor in weights.items():
        initializer = proto.graph.initializer.add(name=name, dims=tensor.shape, data_type=types[name])
        initializer.data_location = onnx.TensorProto.EXTERNAL
        offset, length = places[name]
        for key, value in (("location", file.name), ("offset", offset), ("length", length)):
            initializer.external_data.add(key=key, value=str(value))


def with_weights(manifest: Manifest, name: str, index: int = 0) -> Any:
    """The graph of a folder as an `onnx.ModelProto` whose initializers lie in the weight set `index`."""
    onnx, graph = onnx_package(), manifest.graph(name)
    proto = onnx.load(manifest.folder / graph.file, load_external_data=False)
    for initializer in proto.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = graph.weights[index]
    return proto


def onnx_package() -> Any:
    """The packages that exporting needs; ConfigError says how to get them."""
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx translates with it
    except ImportError as error:
        raise ConfigError(
            f"exporting to ONNX needs a package that is missing ({error}); pip install 'cfengine[export]'"
        ) from error
    return onnx


def _root(error: BaseException) -> str:
    """Type and first line of the error that began it all: the exporter wraps it in advice."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _symbols(part: Part) -> list[str]:
    """Names of the open dimensions of a part's inputs."""
    dims = [dim for port in part.inputs.values() for dim in port.shape if isinstance(dim, str)]
    return list(dict.fromkeys(factored(dim)[1] for dim in dims))


def _example(name: str, port: Port, symbols: dict[str, int]) -> Tensor:
    return torch.zeros([extent(dim, symbols, name) for dim in port.shape], dtype=port.dtype)


def _open(port: Port, dims: dict[str, Any]) -> dict[int, Any] | None:
    """The open dimensions of an operand, as torch.export wants them."""
    found = {}
    for place, dim in enumerate(port.shape):
        if isinstance(dim, str):
            factor, name = factored(dim)
            found[place] = dims[name] if factor == 1 else factor * dims[name]
    return found or None


def _name_shapes(onnx: Any, proto: Any, part: Part) -> None:
    """Write the declared shapes on inputs and outputs; shapes of results on the way are left to who reads the graph."""
    ports = part.inputs | part.outputs
    for value in [*proto.graph.input, *proto.graph.output]:
        if value.name in ports:
            kind = value.type.tensor_type
            shape = onnx.helper.make_tensor_type_proto(kind.elem_type, ports[value.name].shape).tensor_type.shape
            kind.shape.CopyFrom(shape)
    names = [value.name for value in proto.graph.output]
    if names != list(part.outputs):
        raise ExportError(f"graph {part.name!r} has outputs {', '.join(names)}, expected {', '.join(part.outputs)}")
    del proto.graph.value_info[:]


def _forget_sources(proto: Any) -> None:
    """Drop what the exporter notes of lines of Python: it names folders of this machine, and is most of the file."""
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    for thing in [*_nodes(proto.graph), *proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        del thing.metadata_props[:]
        thing.doc_string = ""
    proto.graph.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own workings to itself; what fails is raised."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies: name -> (offset, length) in bytes from the start of the file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {
        name: (8 + length + about["data_offsets"][0], about["data_offsets"][1] - about["data_offsets"][0])
        for name, about in header.items()
        if name != "__metadata__"
    }
