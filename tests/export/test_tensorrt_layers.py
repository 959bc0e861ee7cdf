"""Reading what a builder tells about an engine."""

import pytest

from cfengine.export.tensorrt_layers import contents

pytestmark = pytest.mark.cpu

LOG = """Layers:
Name: quantise_0, LayerType: kgen, \
Inputs: [ { Name: x, Dimensions: [72,192], Datatype: BFloat16, Format: (Linear) a }], \
Constants: [ { Name: s, Dimensions: [], Datatype: BFloat16, Format: (Linear) a }], \
Outputs: [ { Name: y, Dimensions: [72,192], Datatype: FP8, Format: (Linear) a }], TacticName: , StreamId: 0, \
Metadata: [ONNX Layer: w.x_quantise]
Name: node_linear_0, LayerType: gemm, Inputs: [ { Name: y, Dimensions: [72,192], Datatype: FP8, Format: (Linear) a }], \
Constants: [ { Name: w, Dimensions: [64,192], Datatype: FP8, Format: b }, { Name: s, Dimensions: [], Datatype: Float, \
Format: c }], Outputs: [ { Name: z, Dimensions: [72,64], Datatype: BFloat16, Format: c }], TacticName: g, StreamId: 0, \
Metadata: [ONNX Layer: node_linear][ONNX Layer: w.widen]
Name: shape, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 

I/O Tensors:
 Name: x, IOMode: Input, DataType: BFloat16
"""


def test_layers_sizes_and_products():
    found = contents(
        [
            ("INFO", "Total Activation Memory: 8428032 bytes"),
            ("INFO", "Total Weights Memory: 531648 bytes"),
            ("VERBOSE", LOG),
            ("VERBOSE", "Adding 1 engine(s) to plan file."),
        ]
    )
    assert (found.weight_bytes, found.workspace_bytes) == (531648, 8428032)
    quantise, gemm, shape = found.layers
    assert (quantise.kind, quantise.inputs, quantise.outputs) == ("kgen", ("bf16",), ("fp8",))
    assert (gemm.inputs, gemm.constants, gemm.outputs) == (("fp8",), ("fp8", "fp32"), ("bf16",))
    assert gemm.nodes == ("node_linear", "w.widen") and gemm.precision == "fp8"
    assert shape.precision == "none"
    assert found.products() == {"node_linear": "fp8", "w.widen": "fp8"}


def test_a_silent_log_is_an_empty_engine():
    assert contents([("ERROR", "no")]) == ((), 0, 0)
