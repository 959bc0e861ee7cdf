"""The library's e4m3 product: operands on any machine, numbers on a GPU."""

from __future__ import annotations

import pytest
import torch

from cfengine.errors import KernelError
from cfengine.kernels.linear_fp8 import scaled_mm
from cfengine.kernels.linear_fp8.cases import SHAPES, TOLERANCE, make
from cfengine.kernels.linear_fp8.reference import linear_fp8 as reference

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < scaled_mm.OLDEST,
    reason="needs a GPU of compute capability 8.9",
)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_row", [None, False])  # as this device has it; scales in a pass of their own
@pytest.mark.parametrize("with_bias", [True, False])
def test_matches_reference(shape, by_row, with_bias, measure, monkeypatch):
    if by_row is not None:
        monkeypatch.setattr(scaled_mm, "by_row", lambda device: by_row)
    operands = make(shape)
    operands = operands if with_bias else operands[:-1]
    found = scaled_mm.linear_fp8(*(part.cuda() for part in operands))
    rows, scale, *rest = operands
    expected = reference(rows, scale.double(), *rest, dtype=torch.float64)
    assert found.dtype == torch.bfloat16 and measure(found.cpu(), expected) < TOLERANCE


@pytest.mark.gpu
@on_gpu
def test_part_of_the_output_channels(measure):
    """A clean pass multiplies by the lower part of a fused weight alone."""
    rows, scale, weight, weight_scale, bias = (part.cuda() for part in make(SHAPES[0]))
    whole = scaled_mm.linear_fp8(rows, scale, weight, weight_scale, bias)
    part = scaled_mm.linear_fp8(rows, scale, weight[192:], weight_scale[192:], bias[192:])
    assert measure(part.cpu(), whole[:, 192:].double().cpu()) < TOLERANCE


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r, s, w, ws, b: (r.float(), s, w, ws, b), ["rows is float32", "float8_e4m3fn"]),
        (lambda r, s, w, ws, b: (r, s[1:], w, ws, b), ["length of scale is 71", "72"]),
        (lambda r, s, w, ws, b: (r, s, w[1:], ws[1:], b[1:]), ["output channels 575", "16"]),
        (lambda r, s, w, ws, b: (r[:, :-8].contiguous(), s, w[:, :-8].contiguous(), ws, b), ["channels 184", "16"]),
        (lambda r, s, w, ws, b: (r, s, w, ws[1:], b), ["length of weight_scale is 575", "576"]),
        (lambda r, s, w, ws, b: (r, s, w, ws, b.float()), ["bias is float32", "bfloat16"]),
    ],
)
def test_bad_operands(change, words):
    with pytest.raises(KernelError) as caught:
        scaled_mm.linear_fp8(*change(*make(SHAPES[0])))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.cpu
def test_other_results_are_refused():
    operands = make(SHAPES[0], torch.float32)
    with pytest.raises(KernelError, match="the result is to be float32.*load a bfloat16 model"):
        scaled_mm.linear_fp8(*operands, dtype=torch.float32)
