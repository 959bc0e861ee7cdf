"""Tensors behind names: what is taken, what is refused, and what it costs."""

import pytest
import torch

from cfengine.errors import ExportError
from cfengine.segments.binding import Binding, extent, factored
from cfengine.segments.manifest import Graph, Operand

pytestmark = pytest.mark.cpu

GRAPH = Graph(
    "g",
    "g.onnx",
    ("g.safetensors",),
    (
        Operand("x", "float32", ("4*sessions", 3)),
        Operand("keys", "float16", ("sessions", "keys", 3)),
        Operand("bias", "float32", ("sessions", "keys")),
    ),
    (Operand("y", "bfloat16", ("4*sessions", 3)), Operand("z", "float32", (2, "keys"))),
)


def operands(sessions=1, keys=5):
    return {
        "x": torch.randn(4 * sessions, 3),
        "keys": torch.randn(sessions, keys, 3).half(),
        "bias": torch.zeros(sessions, keys),
    }


@pytest.mark.parametrize("sessions", [1, 3])
def test_outputs_have_the_sizes_of_the_inputs(sessions):
    bound = Binding(GRAPH).bind(operands(sessions))
    assert {n: (t.shape, t.dtype) for n, t in bound.outputs.items()} == {
        "y": ((4 * sessions, 3), torch.bfloat16),
        "z": ((2, 5), torch.float32),
    }


def test_operands_are_used_where_they_lie():
    given = operands()
    given["x"] = torch.randn(3, 4).T  # but for one that is not contiguous
    bound = Binding(GRAPH).bind(given)
    assert bound.inputs["bias"].data_ptr() == given["bias"].data_ptr()
    assert bound.inputs["x"].is_contiguous() and torch.equal(bound.inputs["x"], given["x"])


def test_each_call_has_its_own_outputs():
    binding = Binding(GRAPH)
    first, second = (binding.bind(operands()).outputs["y"] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("x", torch.zeros(4, 3, dtype=torch.float64), "x of graph 'g' is float32 and was given float64"),
        ("x", torch.zeros(5, 3), r"was given \[5, 3\]"),
        ("x", torch.zeros(4), r"was given \[4\]"),
        ("bias", torch.zeros(1, 6), r"with sessions = 1, keys = 5 and was given \[1, 6\]"),
        ("bias", torch.zeros(1, 5, device="meta"), "lies on meta and the graph runs on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(name, tensor, words):
    with pytest.raises(ExportError, match=words):
        Binding(GRAPH).bind(operands() | {name: tensor})


@pytest.mark.parametrize("names", [("x", "keys"), ("x", "keys", "bias", "more")])
def test_every_name_has_a_tensor(names):
    with pytest.raises(ExportError, match="takes x, keys, bias and was given"):
        Binding(GRAPH).bind({name: torch.zeros(1) for name in names})


def test_a_symbol_can_be_fixed():
    Binding(GRAPH, fixed={"keys": 5}).bind(operands(keys=5))
    with pytest.raises(ExportError, match=r"with keys = 12, sessions = 1 and was given \[1, 5, 3\]"):
        Binding(GRAPH, fixed={"keys": 12}).bind(operands(keys=5))


def test_dimensions():
    assert factored("72*sessions") == (72, "sessions") and factored("keys") == (1, "keys")
    assert extent("3*s", {"s": 2}, "x") == 6 and extent(7, {}, "x") == 7
    with pytest.raises(ExportError, match="'s' has no value"):
        extent("s", {}, "x")
