"""Tensors behind the names of a graph's operands, checked once for every backend that runs exported graphs.

ONNX Runtime and TensorRT both take a pointer a name and trust the caller with the rest. So the rest is here, where it
can be tested without either: names, types, places and shapes, and memory for the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cfengine.errors import ExportError
from cfengine.segments.manifest import Graph, Operand


class Bound(NamedTuple):
    """Operands of one call, by name; each is contiguous, and of the type and shape that the graph says."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Runner(Protocol):
    """What a backend adds: it runs a graph with the weights of a layer on operands that are bound."""

    device: torch.device

    def run(self, graph: str, index: int, bound: Bound) -> None:
        """Fill `bound.outputs` from `bound.inputs`.  index: which of the graph's weight sets"""
        ...


class Binding:
    """The operands of one graph on one device."""

    def __init__(
        self, graph: Graph, device: torch.device | str = "cpu", fixed: Mapping[str, int] | None = None
    ) -> None:
        """fixed: symbols of shapes that have one value only, such as {"keys": 512} of an engine built for it."""
        self.graph, self.device, self._fixed = graph, placed(device), dict(fixed or {})

    def bind(self, tensors: Mapping[str, Tensor]) -> Bound:
        """Take a tensor for every input, and make the outputs; ExportError names what does not fit.

        A tensor that is not contiguous is copied, any other is used where it lies.
        """
        names = [operand.name for operand in self.graph.inputs]
        if set(names) != set(tensors):
            raise ExportError(
                f"graph {self.graph.name!r} takes {', '.join(names)} and was given {', '.join(tensors) or 'nothing'}; "
                "bind one tensor a name"
            )
        symbols = dict(self._fixed)
        inputs = {operand.name: self._take(operand, tensors[operand.name], symbols) for operand in self.graph.inputs}
        outputs = {
            operand.name: torch.empty(
                [extent(dim, symbols, self._where(operand)) for dim in operand.shape],
                dtype=operand.torch_dtype,
                device=self.device,
            )
            for operand in self.graph.outputs
        }
        return Bound(inputs, outputs)

    def _where(self, operand: Operand) -> str:
        return f"{operand.name} of graph {self.graph.name!r}"

    def _take(self, operand: Operand, tensor: Tensor, symbols: dict[str, int]) -> Tensor:
        where = self._where(operand)
        if tensor.dtype != operand.torch_dtype:
            raise ExportError(
                f"{where} is {operand.dtype} and was given {str(tensor.dtype).removeprefix('torch.')}; "
                "export in the precision that the engine runs in"
            )
        if placed(tensor.device) != self.device:
            raise ExportError(f"{where} lies on {tensor.device} and the graph runs on {self.device}; move it there")
        if tensor.ndim != len(operand.shape) or not all(
            _fits(dim, size, symbols) for dim, size in zip(operand.shape, tensor.shape, strict=True)
        ):
            known = ", ".join(f"{name} = {value}" for name, value in symbols.items())
            raise ExportError(
                f"{where} is {list(operand.shape)}{f' with {known}' if known else ''} and was given "
                f"{list(tensor.shape)}; {self._remedy(operand)}"
            )
        return tensor.contiguous()

    def _remedy(self, operand: Operand) -> str:
        """What helps against a shape: an export for it, but not where an engine has one size for good."""
        names = {factored(dim)[1] for dim in operand.shape if isinstance(dim, str)}
        only = ", ".join(f"{name} = {value}" for name, value in self._fixed.items() if name in names)
        if only:
            return f"the engine was built for {only} alone; open sessions one by one, or choose backend 'torch'"
        return "export for the sizes that are run"


def placed(device: torch.device | str) -> torch.device:
    """A device with its number: "cuda" is the GPU that is current now, whichever is later; a processor has none."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.device(device.type)
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _fits(dim: int | str, size: int, symbols: dict[str, int]) -> bool:
    """Whether a size is what a dimension says; a symbol that is met for the first time takes its value from it."""
    if isinstance(dim, int):
        return size == dim
    factor, name = factored(dim)
    if size % factor:
        return False
    return symbols.setdefault(name, size // factor) == size // factor


def extent(dim: int | str, symbols: Mapping[str, int], where: str) -> int:
    """The size of a dimension; ExportError for a symbol without a value."""
    if isinstance(dim, int):
        return dim
    factor, name = factored(dim)
    if name not in symbols:
        raise ExportError(f"{where} has a dimension {dim!r} and {name!r} has no value; fix it or bind an input with it")
    return factor * symbols[name]


def factored(dim: str) -> tuple[int, str]:
    """ "72*sessions" -> (72, "sessions");  "keys" -> (1, "keys")"""
    factor, star, name = dim.partition("*")
    return (int(factor), name) if star else (1, dim)
