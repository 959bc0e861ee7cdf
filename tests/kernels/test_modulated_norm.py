"""The modulated norm on the CPU against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfengine.errors import KernelError
from cfengine.kernels.modulated_norm.cases import SHAPES, TOLERANCE, Shape, make
from cfengine.kernels.modulated_norm.reference import modulated_norm as reference

pytestmark = pytest.mark.cpu
DTYPES = (torch.float32, torch.bfloat16)


def kernel(*operands, **options):
    from cfengine.kernels.modulated_norm.cpu import modulated_norm

    return modulated_norm(*operands, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(isa, shape, dtype, measure, widen):
    operands = make(shape, dtype)
    found = kernel(*operands)
    assert found.dtype == dtype
    assert measure(found, reference(*widen(operands))) < TOLERANCE[dtype]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.builds(Shape, frames=st.integers(1, 4), page_tokens=st.integers(1, 60), dim=st.integers(16, 300)),
    dtype=st.sampled_from(DTYPES),
)
def test_random_shapes(isa, shape, dtype, measure, widen):
    operands = make(shape, dtype, seed=1)
    assert measure(kernel(*operands), reference(*widen(operands))) < TOLERANCE[dtype]


def test_strided_rows_and_mixed_types(isa, measure, widen):
    x, shift, scale = make(SHAPES[0], torch.bfloat16)
    wide = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    found = kernel(wide, shift.float(), scale)
    assert torch.equal(found, kernel(x, shift, scale))


def test_eps_counts(isa, measure, widen):
    x, shift, scale = make(SHAPES[0], torch.float32)
    x = 1e-3 * (x - x.mean(1, keepdim=True))
    expected = reference(*widen((x, shift, scale)), eps=1e-4)
    assert measure(kernel(x, shift, scale, eps=1e-4), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, a, b: (x.double(), a, b), ["x is float64"]),
        (lambda x, a, b: (x[:5], a, b), ["tokens of x 5", "multiple", "3"]),
        (lambda x, a, b: (x, a[:, :8], b), ["width of shift is 8", "192"]),
        (lambda x, a, b: (x, a, b[:1]), ["frames of scale is 1", "is 3"]),
        (lambda x, a, b: (x.T.contiguous().T, a, b), ["last stride of x is 72"]),
    ],
)
def test_bad_operands(isa, change, words):
    with pytest.raises(KernelError) as caught:
        kernel(*change(*make(SHAPES[0], torch.float32)))
    for word in words:
        assert word in str(caught.value)
