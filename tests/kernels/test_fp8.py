"""The meaning of e4m3 rows and of the products on them, in plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfengine.kernels.fp8 import LARGEST, quantise
from cfengine.kernels.gated_residual import cases as residual_cases
from cfengine.kernels.gated_residual.reference import gated_residual
from cfengine.kernels.linear_fp8.cases import SHAPES as LINEAR_SHAPES
from cfengine.kernels.linear_fp8.cases import make as make_linear
from cfengine.kernels.linear_fp8.reference import linear_fp8
from cfengine.kernels.modulated_norm import cases as norm_cases
from cfengine.kernels.modulated_norm.reference import modulated_norm
from cfengine.kernels.paged_attention import cases as attention_cases
from cfengine.kernels.paged_attention.reference import paged_attention as attention_reference
from cfengine.kernels.paged_attention.rounding import paged_attention as rounding
from cfengine.kernels.paged_attention.sdpa import paged_attention as sdpa
from cfengine.kernels.qk_norm_rope_store import cases as store_cases
from cfengine.kernels.qk_norm_rope_store.reference import qk_norm_rope_store as store
from cfengine.kernels.quantise_rows.cases import SHAPES, make, steps
from cfengine.kernels.quantise_rows.reference import quantise_rows

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_come_back(shape, dtype):
    x = make(shape, dtype)
    values, scale = quantise_rows(x)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape and scale.shape == x.shape[:1]
    back = values.double() * scale.double()[:, None]
    # half a step of 3 bits of mantissa; below the smallest normal number, 2^-6, half of a step of 2^-9
    bound = torch.maximum(x.double().abs() * 2**-4, scale.double()[:, None] * 2**-10) * (1 + 1e-6)
    assert bool(((back - x.double()).abs() <= bound).all())
    assert float(values.float().abs().amax()) == LARGEST or not x.any()


def test_gelu_comes_first():
    x = make(SHAPES[0], torch.bfloat16)
    wide = torch.nn.functional.gelu(x.float(), approximate="tanh")
    for found, expected in zip(quantise_rows(x, gelu=True), quantise_rows(wide), strict=True):
        assert torch.equal(found.float(), expected.float())


def test_scale_over_several_axes():
    x = torch.randn(3, 5, 2, 4)
    values, scale = quantise(x, (1, 3))
    assert scale.shape == (3, 1, 2, 1)
    assert torch.equal(scale[1, 0, 1, 0], x[1, :, 1].abs().max() / LARGEST)
    assert torch.equal(values.float().abs().amax((1, 3)), torch.full((3, 2), LARGEST))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(2.0**-12, 448.0), st.booleans())
def test_rounding_is_to_the_nearest(size, negative):
    """The neighbours on both sides are no nearer."""
    x = torch.tensor([[-size if negative else size, 448.0]])
    values, scale = quantise(x)
    assert float(scale) == 1
    every = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    value = x[0, 0].double()
    assert float((values[0, 0].double() - value).abs()) == float((every - value.abs()).abs().min())


@pytest.mark.parametrize("shape", norm_cases.SHAPES)
def test_norm_in_e4m3(shape):
    """The rounding of the norm that was not rounded before."""
    x, shift, scale = norm_cases.make(shape, torch.bfloat16)
    found = modulated_norm(x, shift, scale, fp8=True)
    expected = quantise_rows(modulated_norm(x.float(), shift, scale))
    assert not steps(found.values, expected.values).any() and torch.equal(found.scale, expected.scale)


def test_residual_in_e4m3():
    x, y, *factors = residual_cases.make(residual_cases.SHAPES[0], torch.bfloat16)
    found_x, found = gated_residual(x.clone(), y, *factors, fp8=True)
    expected_x, _ = gated_residual(x.clone(), y, *factors)
    expected = modulated_norm(expected_x, *factors[1:], fp8=True)
    assert torch.equal(found_x, expected_x)  # the sum itself stays in its type
    assert not steps(found.values, expected.values).any()


@pytest.mark.parametrize("shape", LINEAR_SHAPES)
def test_linear_is_the_product_of_what_the_rows_stand_for(shape, measure):
    rows, scale, weight, weight_scale, bias = make_linear(shape)
    found = linear_fp8(rows, scale, weight, weight_scale, bias, dtype=torch.float32)
    x = rows.double() * scale.double()[:, None]
    expected = x @ (weight.double() * weight_scale.double()[:, None]).T + bias.double()
    assert measure(found, expected) < 2e-6  # sums of a few thousand products in float32
    without = linear_fp8(rows, scale, weight, weight_scale, dtype=torch.float32)
    assert measure(without, expected - bias.double()) < 2e-6


def test_linear_of_rounded_operands_is_near_the_wide_one():
    """Two operands off by 2^-4 at most, at random: 2^-4 / sqrt(3) each, less in the mean, and nothing that adds up."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 1536, generator=generator), torch.randn(96, 1536, generator=generator)
    found = linear_fp8(*quantise_rows(x), *quantise_rows(w), dtype=torch.float32)
    expected = x @ w.T
    assert float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.045


def rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared error over that of the expected values."""
    return float((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("shape", attention_cases.SHAPES)
def test_attention_to_e4m3_pages(shape, widen):
    """The attention to what the pages stand for, with and without the rounding of a kernel."""
    q, k, v, *table = attention_cases.make(shape, torch.float32)
    k8, v8, scales = attention_cases.narrow(k, v)
    meant = [p.double() * s.double()[:, None, :, None] for p, s in zip((k8, v8), scales.values(), strict=True)]
    expected = attention_reference(q.double(), *meant, *table)
    assert rms(attention_reference(q, k8, v8, *table, **scales), expected) < 1e-6
    assert rms(sdpa(q, k8, v8, *table, **scales), expected) < 1e-6
    assert rms(rounding(q, k8, v8, *table, **scales, wide=True), expected) < 1e-6
    rounded = rms(rounding(q, k8, v8, *table, **scales), expected)
    assert rounded < attention_cases.FP8_TOLERANCE and (rounded > 1e-4 or shape.slots == 1)


def test_attention_ignores_the_scale_of_pages_not_shown():
    q, k, v, *table = attention_cases.make(attention_cases.SHAPES[4], torch.float32, unused=2)
    k8, v8, scales = attention_cases.narrow(k, v)
    expected = attention_reference(q, k8, v8, *table, **scales)
    for scale in scales.values():
        scale[table[0][-2:].long()] = float("nan")
    assert torch.equal(attention_reference(q, k8, v8, *table, **scales), expected)


@pytest.mark.parametrize("shape", attention_cases.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_library_attention(shape, dtype, measure, widen):
    operands = attention_cases.make(shape, dtype)
    found = sdpa(*operands)
    assert found.dtype == dtype and found.shape == operands[0].shape
    assert measure(found, attention_reference(*widen(operands))) < attention_cases.TOLERANCE[dtype]


def test_library_attention_at_positions_in_the_millions(measure, widen):
    operands = attention_cases.make(
        attention_cases.Shape(12, 3, 6, 2, 32), torch.float32, first_position=5_000_000, unused=2
    )
    found = sdpa(*operands)
    assert measure(found, attention_reference(*widen(operands))) < attention_cases.TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", store_cases.SHAPES)
def test_pages_in_e4m3(shape):
    """Each written page is the rounding of the wide one, with its largest number at 448; others stay as they were."""
    wide, narrow, scales = store_cases.make_narrow(shape, torch.bfloat16)
    query, mean = store(*wide)
    found_query, found_mean = store(*narrow, **scales)
    assert torch.equal(found_query, query) and torch.equal(found_mean, mean)
    ids, frames = wide[7].long(), shape.frames
    for pages, expected, scale in zip(narrow[5:7], wide[5:7], scales.values(), strict=True):
        values, sizes = quantise(expected[ids], (1, 3))
        assert not steps(pages.float()[ids].to(values.dtype), values).any()
        assert torch.equal(scale[ids], sizes[:, 0, :, 0])
        other = torch.ones(len(scale), dtype=torch.bool)
        other[ids] = False
        assert int(other.sum()) == len(scale) - frames and not pages.float()[other].any() and (scale[other] == 1).all()
