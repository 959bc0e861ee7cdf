"""An exported graph as TensorRT takes it: no open shapes, attention in single nodes. What it means stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfengine.errors import ExportError
from cfengine.segments.binding import extent


def fixed(model: Any, symbols: Mapping[str, int]) -> Any:
    """Give every open dimension of inputs and outputs its value, in place: "keys", "72*sessions" ...; -> model."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = extent(dim.dim_param, symbols, f"{value.name} of graph {model.graph.name!r}")
    del model.graph.value_info[:]
    return model


def plain_attention(model: Any) -> Any:
    """Replace `Attention` with a mask by softmax(q k / sqrt(d) + mask) v in single nodes, in place; -> model.

    The mask is float32 beside q, k and v in 16 bits, since in bfloat16 the weight of the padding would be off by up to
    1.6 %. TensorRT-RTX 1.7 adds such a mask to 16-bit scores and fails; it makes one kernel of the single nodes.
    """
    from onnx import shape_inference

    graph, types = model.graph, None
    for place, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Attention" and len(node.input) > 3 and node.input[3]:
            types = types or {v.name: v.type.tensor_type for v in shape_inference.infer_shapes(model).graph.value_info}
            steps = _attention_steps(graph, node, types[node.input[0]])
            graph.node.remove(node)
            for i, step in enumerate(steps):
                graph.node.insert(place + i, step)
    return model


def _attention_steps(graph: Any, node: Any, query: Any) -> list[Any]:
    """Nodes that compute what an `Attention` over (batch, heads, tokens, head_dim) does.  query: type and shape of q"""
    from onnx import TensorProto, helper

    extra = {a.name for a in node.attribute if a.i or a.f} - {"scale"}  # the rest is off
    if extra or len(node.output) > 1 or any(node.input[4:]):
        raise ExportError(
            f"{node.name} is an Attention with {', '.join(sorted(extra)) or 'a cache'}, which is not taken apart here; "
            "export with cfengine export onnx"
        )
    q, k, v, mask = node.input[:4]
    name, kind = node.name, query.elem_type
    scale = next((a.f for a in node.attribute if a.name == "scale"), query.shape.dim[-1].dim_value ** -0.5)
    graph.initializer.append(helper.make_tensor(f"{name}_scale", TensorProto.FLOAT, [], [scale]))
    step = helper.make_node
    return [
        step("Transpose", [k], [f"{name}_kt"], f"{name}_transpose", perm=[0, 1, 3, 2]),
        step("MatMul", [q, f"{name}_kt"], [f"{name}_qk"], f"{name}_scores"),
        step("Cast", [f"{name}_qk"], [f"{name}_wide"], f"{name}_widen", to=TensorProto.FLOAT),
        step("Mul", [f"{name}_wide", f"{name}_scale"], [f"{name}_scaled"], f"{name}_rescale"),
        step("Add", [f"{name}_scaled", mask], [f"{name}_masked"], f"{name}_mask"),
        step("Softmax", [f"{name}_masked"], [f"{name}_shares"], f"{name}_softmax", axis=-1),
        step("Cast", [f"{name}_shares"], [f"{name}_narrow"], f"{name}_round", to=kind),
        step("MatMul", [f"{name}_narrow", v], list(node.output), f"{name}_sum"),
    ]
