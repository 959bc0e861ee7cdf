"""Cross-attention in Triton against its float64 reference: on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from cfengine.errors import KernelError
from cfengine.kernels.cross_attention.cases import SHAPES, TOLERANCE, make
from cfengine.kernels.cross_attention.reference import cross_attention as reference

pytest.importorskip("triton", reason="pip install triton")
from cfengine.kernels.cross_attention.triton import cross_attention  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# bfloat16 is left to the GPU: the interpreter of Triton 3.9 multiplies bfloat16 matrices wrongly
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
pytestmark = [pytest.mark.gpu if GPU else pytest.mark.cpu]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape, dtype, measure, widen):
    operands = make(shape, dtype)
    found = cross_attention(*(t.to(DEVICE) for t in operands)).cpu()
    assert found.dtype == dtype and found.shape == operands[0].shape
    *wide, bias = operands
    assert measure(found, reference(*widen(wide), bias)) < TOLERANCE[dtype]


def test_padding_is_neither_read_nor_counted():
    """Keys of bias -inf may hold anything; a first tile of them alone is no harm either."""
    q, k, v, bias = (t.to(DEVICE) for t in make(SHAPES[1], torch.float32))
    expected = cross_attention(q, k, v, bias)
    k[100:], v[100:] = float("nan"), float("nan")
    assert torch.equal(cross_attention(q, k, v, bias), expected)
    last = torch.full_like(bias, float("-inf"))
    last[99] = 0.0
    torch.testing.assert_close(cross_attention(q, k, v, last), v[99].expand_as(q))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v, bias: (q, k[1:], v, bias), ["keys of k is 511", "512"]),
        (lambda q, k, v, bias: (q, k, v.half(), bias), ["v is float16", "float32"]),
        (lambda q, k, v, bias: (q, k, v, bias.double()), ["bias is float64", "float32"]),
    ],
)
def test_bad_operands(change, words):
    with pytest.raises(KernelError) as caught:
        cross_attention(*change(*(t.to(DEVICE) for t in make(SHAPES[1], torch.float32))))
    for word in ("cross_attention", *words):
        assert word in str(caught.value)
