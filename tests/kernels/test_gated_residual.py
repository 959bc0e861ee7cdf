"""The gated residual on the CPU against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfengine.errors import KernelError
from cfengine.kernels.gated_residual.cases import SHAPES, TOLERANCE, Shape, make
from cfengine.kernels.gated_residual.reference import gated_residual as reference

pytestmark = pytest.mark.cpu
DTYPES = (torch.float32, torch.bfloat16)


def kernel(*operands, **options):
    from cfengine.kernels.gated_residual.cpu import gated_residual

    return gated_residual(*operands, **options)


def compare(operands, dtype, measure, widen):
    wide = widen(operands)
    x, y, *factors = [t if t is None else t.clone() for t in operands]
    updated, normed = kernel(x, y, *factors)
    expected, expected_norm = reference(wide[0].clone(), *wide[1:])
    assert updated is x and updated.dtype == dtype
    assert measure(x, expected) < TOLERANCE[dtype]
    if operands[3] is None:
        assert normed is None
    else:
        assert measure(normed, expected_norm) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_matches_reference(isa, shape, dtype, gated, normed, measure, widen):
    x, y, gate, shift, scale = make(shape, dtype)
    operands = (x, y, gate if gated else None, *((shift, scale) if normed else (None, None)))
    compare(operands, dtype, measure, widen)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.builds(Shape, frames=st.integers(1, 4), page_tokens=st.integers(1, 60), dim=st.integers(16, 300)),
    dtype=st.sampled_from(DTYPES),
)
def test_random_shapes(isa, shape, dtype, measure, widen):
    compare(make(shape, dtype, seed=1), dtype, measure, widen)


def test_one_shift_for_all_frames(isa, measure, widen):
    x, y, gate, shift, scale = make(SHAPES[0], torch.float32)
    compare((x, y, gate, shift[:1], scale[:1]), torch.float32, measure, widen)


def test_strided_rows(isa):
    x, y, *factors = make(SHAPES[0], torch.float32)
    frame = torch.zeros(x.shape[0], 2 * x.shape[1])
    view = frame[:, : x.shape[1]].copy_(x)
    _, found = kernel(view, torch.cat([y, y], dim=1)[:, : y.shape[1]], *factors)
    _, expected = kernel(x, y, *factors)
    assert torch.equal(found, expected) and torch.equal(view, x)
    assert not frame[:, x.shape[1] :].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y, *f: (x, y.bfloat16(), *f), ["y is bfloat16", "float32"]),
        (lambda x, y, *f: (x, y[:-1], *f), ["tokens of y is 71", "72"]),
        (lambda x, y, *f: (x, y[:, :-1], *f), ["width of y is 191", "192"]),
        (lambda x, y, g, a, b: (x, y, g, a, None), ["shift is given without scale"]),
        (lambda x, y, g, a, b: (x, y, g[0], a, b), ["gate has 1 axes", "2"]),
        (lambda x, y, g, a, b: (x, y, torch.cat([g, g])[:5], a, b), ["tokens of x 72", "frames of gate 5"]),
    ],
)
def test_bad_operands(isa, change, words):
    with pytest.raises(KernelError) as caught:
        kernel(*change(*make(SHAPES[0], torch.float32)))
    for word in words:
        assert word in str(caught.value)
