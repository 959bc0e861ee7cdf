"""Weights in 8 and 4 bits, and graphs with Q/DQ nodes run by ONNX Runtime and by hand."""

import numpy as np
import pytest

from cfengine.errors import ExportError
from cfengine.export.tensorrt_quantise import BLOCK, fp4_weight, fp8_weight, quantised

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.cpu

ROWS, IN, OUT = 24, 64, 48


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(weight):
    """A graph y = x w^T + b."""
    from onnx import TensorProto, helper, numpy_helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [ROWS, s]) for n, s in (("x", IN), ("y", OUT))]
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(random(OUT, seed=2), "b")]
    graph = helper.make_graph([gemm], "g", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def close(got, want):
    """Root mean square error over root mean square."""
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_fp8_weights_round_each_channel_by_itself():
    weight = random(OUT, IN) * np.logspace(-4, 4, OUT, dtype=np.float32)[:, None]
    weight[3] = 0
    rounded = fp8_weight(weight)
    back = rounded.values.astype(np.float32) * rounded.scale[:, None]
    steps = np.abs(back - weight) / np.maximum(np.abs(weight), rounded.scale[:, None] * 2**-6)
    assert steps.max() <= 2**-4 * 1.0001  # e4m3 has 3 bits behind the leading one: half a step is 1/16 of a value
    assert np.isfinite(back).all()


def test_fp4_weights_round_in_blocks():
    weight = random(OUT, IN) * np.logspace(-1, 1, OUT, dtype=np.float32)[:, None]
    weight[3], weight[4, :BLOCK] = 0, 0
    rounded = fp4_weight(weight)
    scale = np.repeat(rounded.scale.astype(np.float32), BLOCK, axis=1) * rounded.outer
    back = rounded.values.astype(np.float32) * scale
    # the widest step of e2m1 is 2, between 4 and 6, of a block's largest value in 6; scales in e4m3 add 1/16
    assert (np.abs(back - weight) <= np.abs(weight).reshape(OUT, -1, BLOCK).max(-1).repeat(BLOCK, 1) / 6 * 1.4).all()
    assert close(back, weight) < 0.12  # 0.095 as measured, for normal values
    assert not back[3].any()


def test_an_fp8_graph_computes_the_product():
    ort = pytest.importorskip("onnxruntime")
    weight, x = random(OUT, IN, seed=1), random(ROWS, IN)
    made = quantised(product(weight), "fp8", {"w": float(np.abs(x).max())})
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    got, want = session.run(None, {"x": x})[0], x @ weight.T + random(OUT, seed=2)
    assert 0.005 < close(got, want) < 0.05  # two operands rounded to 4 bits: 2^-4 / sqrt(3) each at most
    assert "w" not in [i.name for i in made.graph.initializer]


def test_an_nvfp4_graph_holds_what_tensorrt_reads():
    made = quantised(product(random(OUT, IN, seed=1)), "nvfp4", {"w": 3.0})
    sizes = {i.name: (tuple(i.dims), i.data_type, len(i.raw_data)) for i in made.graph.initializer}
    kinds = onnx.TensorProto
    assert sizes["w.e2m1"] == ((OUT, IN), kinds.FLOAT4E2M1, OUT * IN // 2)
    assert sizes["w.scales"] == ((OUT, IN // BLOCK), kinds.FLOAT8E4M3FN, OUT * IN // BLOCK)
    dynamic = next(node for node in made.graph.node if node.op_type == "TRT_FP4DynamicQuantize")
    assert dynamic.domain == "trt" and dynamic.input[0] == "x"
    read = onnx.numpy_helper.to_array(next(i for i in made.graph.initializer if i.name == "w.e2m1"))
    assert (read.astype(np.float32) == fp4_weight(random(OUT, IN, seed=1)).values.astype(np.float32)).all()
    assert made.graph.node[-1].op_type == "Gemm"


@pytest.mark.parametrize(
    ("precision", "largest", "words"),
    [("int8", {"w": 1.0}, "int8"), ("fp8", {"other": 1.0}, "no product with 'other'; it has w")],
)
def test_what_cannot_be_rounded_is_named(precision, largest, words):
    with pytest.raises(ExportError, match=words):
        quantised(product(random(OUT, IN)), precision, largest)


def test_rows_that_do_not_divide_into_blocks_are_refused():
    graph = product(random(OUT, IN))
    weight = np.zeros((OUT, IN + 8), np.float32)
    graph.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    with pytest.raises(ExportError, match="rows of 72"):
        quantised(graph, "nvfp4", {"w": 1.0})
