"""What a TensorRT engine consists of: its layers, the types that they compute in, its weights and its workspace.

A builder tells its log, at the most talkative level, the same one-line-a-layer text that an engine inspector gives. So
an engine can be examined on the machine that builds it, where there may be no GPU to load it on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

TYPES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "FP8": "fp8", "FP4E2M1": "nvfp4"}
PRODUCTS = ("gemm", "runtime_fusion")  # kinds of layers that multiply by a weight
_SHOWN = "Layers:\n"
_KIND = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+)")
_OPERANDS = re.compile(r", (Inputs|Constants|Outputs): \[")
_NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_SIZES = {"weights": r"Total Weights Memory: (\d+) bytes", "workspace": r"Total Activation Memory: (\d+) bytes"}


class Layer(NamedTuple):
    """One kernel of an engine.

    kind: "gemm", "kgen" (generated), "runtime_fusion" (a product with what follows it) ...
    inputs, constants, outputs: types, by the names that TYPES gives or as TensorRT calls them
    nodes: names of the ONNX nodes that it computes
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def precision(self) -> str:
        """The narrowest type among its operands: what a product is multiplied in."""
        operands = {*self.inputs, *self.constants}
        return next((name for name in ("nvfp4", "fp8", "fp16", "bf16", "fp32") if name in operands), "none")


class Contents(NamedTuple):
    """What an engine holds; sizes in bytes."""

    layers: tuple[Layer, ...]
    weight_bytes: int
    workspace_bytes: int

    def products(self) -> dict[str, str]:
        """ONNX node of each matrix product -> the precision it is multiplied in."""
        return {node: layer.precision for layer in self.layers if layer.kind in PRODUCTS for node in layer.nodes}


def layers(text: str) -> tuple[Layer, ...]:
    """Parse the one-line form of an engine inspector (`LayerInformationFormat.ONELINE`)."""
    return tuple(_layer(line) for line in text.splitlines() if _KIND.match(line))


def contents(log: Iterable[tuple[str, str]]) -> Contents:
    """Contents of the engine whose build wrote this log, (severity, text) each; sizes that it lacks are 0."""
    found, sizes = (), dict.fromkeys(_SIZES, 0)
    for _, text in log:
        if text.startswith(_SHOWN):
            found = layers(text)
        for name, pattern in _SIZES.items():
            if match := re.match(pattern, text):
                sizes[name] = int(match.group(1))
    return Contents(found, sizes["weights"], sizes["workspace"])


def _layer(line: str) -> Layer:
    head, *parts = _OPERANDS.split(line)
    types = dict.fromkeys(("Inputs", "Constants", "Outputs"), ())
    for place, body in zip(parts[::2], parts[1::2], strict=True):
        types[place] = tuple(TYPES.get(name, name.lower()) for name in re.findall(r"Datatype: (\w+)", body))
    found = _KIND.match(head)
    return Layer(found["name"], found["kind"], *types.values(), nodes=tuple(_NODES.findall(line)))
