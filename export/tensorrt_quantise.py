"""Products of a graph in e4m3 or nvfp4: Q/DQ nodes around their operands, weights rounded once and for all.

fp8     x: one scale, from calibration      weight: one scale an output channel, from its largest value
nvfp4   x, weight: one e4m3 scale for every 16 values along the reduction, and one scale over those; the small scales of
        x are taken as it comes, the large one is from calibration

A product keeps the type of its bias, in which it is summed up and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cfengine.errors import ExportError

FP8_MOST, FP4_MOST = 448.0, 6.0  # largest e4m3 and e2m1
BLOCK = 16
DOMAIN = "trt"  # TensorRT's own operators; TRT_FP4DynamicQuantize is the only one here
SCALED = ("fp8", "nvfp4")


class Rounded(NamedTuple):
    """A weight (out, in) in few bits. values: e4m3 or e2m1      scale: (out,), or (out, in / 16) e4m3 times `outer`"""

    values: np.ndarray
    scale: np.ndarray
    outer: np.ndarray | None = None


def fp8_weight(weight: np.ndarray) -> Rounded:
    """e4m3 with one scale an output channel, in the weight's own type."""
    from ml_dtypes import float8_e4m3fn

    wide = weight.astype(np.float32)
    most = np.abs(wide).max(axis=1)
    scale = np.where(most > 0, most / FP8_MOST, 1).astype(weight.dtype)
    exact = np.clip(wide / scale.astype(np.float32)[:, None], -FP8_MOST, FP8_MOST)
    return Rounded(exact.astype(float8_e4m3fn), scale)


def fp4_weight(weight: np.ndarray) -> Rounded:
    """e2m1 with an e4m3 scale for every 16 values of a row, and one scale over those; rows divide into 16s."""
    from ml_dtypes import float4_e2m1fn, float8_e4m3fn

    wide = weight.astype(np.float32)
    blocks = wide.reshape(wide.shape[0], -1, BLOCK)
    most = np.abs(blocks).max(axis=-1)
    outer = np.asarray(max(most.max() / (FP4_MOST * FP8_MOST), np.finfo(np.float32).tiny)).astype(weight.dtype)
    inner = np.clip(most / FP4_MOST / outer.astype(np.float32), 0, FP8_MOST).astype(float8_e4m3fn)
    scale = inner.astype(np.float32)[..., None] * outer.astype(np.float32)
    exact = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    values = np.clip(exact, -FP4_MOST, FP4_MOST).reshape(wide.shape).astype(float4_e2m1fn)
    return Rounded(values, inner, outer)


def quantised(model: Any, precision: str, largest: Mapping[str, float]) -> Any:
    """Round products of a graph with embedded weights, in place; -> model.

    largest: name of a product's weight -> largest value of what it is multiplied with, for every product to be rounded
    Raises ExportError for a name that no product has, and where rows do not divide into blocks.
    """
    from onnx import helper

    if precision not in SCALED:
        raise ExportError(f"products are rounded to {' or '.join(SCALED)}, not to {precision!r}")
    graph = model.graph
    places = {node.input[1]: place for place, node in enumerate(graph.node) if node.op_type == "Gemm"}
    missing = set(largest) - set(places)
    if missing:
        raise ExportError(f"the graph has no product with {sorted(missing)[0]!r}; it has {', '.join(places)}")
    write = _fp8 if precision == "fp8" else _nvfp4
    for name, place in sorted(places.items(), key=lambda item: -item[1]):
        if name in largest:
            steps = write(graph, graph.node[place], largest[name])
            for i, step in enumerate(steps):
                graph.node.insert(place + i, step)
    if precision == "nvfp4":
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


def _fp8(graph: Any, gemm: Any, most: float) -> list[Any]:
    from ml_dtypes import float8_e4m3fn
    from onnx import helper

    x, name = gemm.input[0], gemm.input[1]
    weight = _taken(graph, name)
    rounded = fp8_weight(weight)
    _give(graph, f"{name}.e4m3", rounded.values)
    _give(graph, f"{name}.scale", rounded.scale)
    _give(graph, f"{name}.x_scale", np.asarray(max(most, 1e-6) / FP8_MOST).astype(weight.dtype))
    _give(graph, f"{name}.zero", np.zeros((), float8_e4m3fn))
    step = helper.make_node
    gemm.input[0], gemm.input[1] = f"{name}.x", f"{name}.wide"
    return [
        step("QuantizeLinear", [x, f"{name}.x_scale", f"{name}.zero"], [f"{name}.x_e4m3"], f"{name}.x_quantise"),
        step("DequantizeLinear", [f"{name}.x_e4m3", f"{name}.x_scale"], [f"{name}.x"], f"{name}.x_widen"),
        step("DequantizeLinear", [f"{name}.e4m3", f"{name}.scale"], [f"{name}.wide"], f"{name}.widen", axis=0),
    ]


def _nvfp4(graph: Any, gemm: Any, most: float) -> list[Any]:
    from onnx import TensorProto, helper

    x, name = gemm.input[0], gemm.input[1]
    weight = _taken(graph, name)
    if weight.shape[1] % BLOCK:
        raise ExportError(f"{name} has rows of {weight.shape[1]}, which do not divide into blocks of {BLOCK} for nvfp4")
    rounded = fp4_weight(weight)
    _give(graph, f"{name}.e2m1", rounded.values)
    _give(graph, f"{name}.scales", rounded.scale)
    _give(graph, f"{name}.outer", rounded.outer)
    _give(graph, f"{name}.x_outer", np.asarray(max(most, 1e-6) / (FP4_MOST * FP8_MOST)).astype(weight.dtype))
    step, blocks = helper.make_node, {"axis": 1, "block_size": BLOCK}
    gemm.input[0], gemm.input[1] = f"{name}.x", f"{name}.wide"
    x_parts = [f"{name}.x_e2m1", f"{name}.x_scales"]
    return [
        step("DequantizeLinear", [f"{name}.scales", f"{name}.outer"], [f"{name}.scale"], f"{name}.scale_widen"),
        step("DequantizeLinear", [f"{name}.e2m1", f"{name}.scale"], [f"{name}.wide"], f"{name}.widen", **blocks),
        step(
            "TRT_FP4DynamicQuantize", [x, f"{name}.x_outer"], x_parts, f"{name}.x_quantise", domain=DOMAIN,
            scale_type=TensorProto.FLOAT8E4M3FN, **blocks,
        ),
        step("DequantizeLinear", [x_parts[1], f"{name}.x_outer"], [f"{name}.x_scale"], f"{name}.x_scale_widen"),
        step("DequantizeLinear", [x_parts[0], f"{name}.x_scale"], [f"{name}.x"], f"{name}.x_widen", **blocks),
    ]  # fmt: skip


def _taken(graph: Any, name: str) -> np.ndarray:
    """The value of an initializer, which leaves the graph."""
    from onnx import numpy_helper

    place = next(i for i, initializer in enumerate(graph.initializer) if initializer.name == name)
    value = numpy_helper.to_array(graph.initializer[place])
    del graph.initializer[place]
    return value


def _give(graph: Any, name: str, value: np.ndarray) -> None:
    """Add an initializer of any type; two e2m1 share a byte, the first in its low half."""
    from onnx import helper

    raw = value.tobytes()
    if value.dtype.name == "float4_e2m1fn":
        pairs = value.view(np.uint8).reshape(-1, 2)
        raw = (pairs[:, 0] & 15 | pairs[:, 1] << 4).tobytes()
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    graph.initializer.append(helper.make_tensor(name, kind, value.shape, raw, raw=True))
