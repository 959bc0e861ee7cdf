"""Triton kernels that round to e4m3, and the sampler's two, against their references: on the GPU, else interpreted.

The interpreter of Triton 3.9 loses the carry where it rounds to e4m3 itself, so what runs there is the kernels' own
rounding; the GPU's conversion runs on GPUs.
"""

from __future__ import annotations

import pytest
import torch

from cfengine.kernels.flow_to_x0.reference import flow_to_x0 as flow_reference
from cfengine.kernels.gated_residual import cases as residual_cases
from cfengine.kernels.gated_residual.reference import gated_residual as residual_reference
from cfengine.kernels.modulated_norm import cases as norm_cases
from cfengine.kernels.modulated_norm.reference import modulated_norm as norm_reference
from cfengine.kernels.paged_attention import cases as attention_cases
from cfengine.kernels.paged_attention.reference import paged_attention as attention_reference
from cfengine.kernels.qk_norm_rope_store import cases as store_cases
from cfengine.kernels.qk_norm_rope_store.reference import qk_norm_rope_store as store_reference
from cfengine.kernels.quantise_rows.cases import SHAPES, make, steps
from cfengine.kernels.quantise_rows.reference import quantise_rows as rows_reference
from cfengine.kernels.renoise.reference import renoise as renoise_reference

triton = pytest.importorskip("triton", reason="pip install triton")
import triton.language as tl  # noqa: E402

from cfengine.kernels.flow_to_x0.triton import flow_to_x0  # noqa: E402
from cfengine.kernels.gated_residual.triton import gated_residual  # noqa: E402
from cfengine.kernels.modulated_norm.triton import modulated_norm  # noqa: E402
from cfengine.kernels.paged_attention.triton import paged_attention  # noqa: E402
from cfengine.kernels.qk_norm_rope_store.triton import qk_norm_rope_store  # noqa: E402
from cfengine.kernels.quantise_rows.triton import e4m3, quantise_rows  # noqa: E402
from cfengine.kernels.renoise.triton import renoise  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = [pytest.mark.gpu if GPU else pytest.mark.cpu]


def moved(operands):
    return tuple(t.to(DEVICE) if torch.is_tensor(t) else t for t in operands)


def close(found, expected):
    """Rows that were summed in another order: a value between two e4m3 numbers may fall to either, and few are."""
    near(found.values, expected.values)
    assert float((found.scale.cpu() / expected.scale - 1).abs().max()) < 1e-5


def near(found, expected, share: float = 0.01):
    apart = steps(found.cpu().float().to(expected.dtype), expected.float().to(expected.dtype))
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) <= share


def rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared error over that of the expected values."""
    return float((found.cpu().double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@triton.jit
def _round(x, out, N: tl.constexpr, HARDWARE: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out + place, e4m3(tl.load(x + place), HARDWARE))


@pytest.mark.parametrize("hardware", [False, True] if GPU and torch.cuda.get_device_capability() >= (8, 9) else [False])
def test_every_rounding(hardware):
    """Every e4m3 number, every midpoint between two and its float32 neighbours, both signs."""
    numbers = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.full_like(middle, end)) for end in (1e9, -1e9))
    x = torch.cat([numbers, middle, up, down])
    x = torch.nn.functional.pad(torch.cat([x, -x]), (0, 1024 - 2 * len(x)))
    out = torch.empty(1024, dtype=torch.uint8, device=DEVICE)
    _round[(1,)](x.to(DEVICE), out, 1024, hardware)
    assert torch.equal(out.cpu().view(torch.float8_e4m3fn).float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape, dtype):
    x = make(shape, dtype)
    found, expected = quantise_rows(x.to(DEVICE)), rows_reference(x)
    assert not steps(found.values.cpu(), expected.values).any()  # one product and one rounding: bit for bit
    assert torch.equal(found.scale.cpu(), expected.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_rows(shape, dtype):
    x = make(shape, dtype)
    close(quantise_rows(x.to(DEVICE), gelu=True), rows_reference(x, gelu=True))


def test_strided_rows():
    x = make(SHAPES[0], torch.float32)
    wide = torch.cat([x, x], dim=1).to(DEVICE)[:, : x.shape[1]]
    assert not steps(quantise_rows(wide).values.cpu(), rows_reference(x).values).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", norm_cases.SHAPES)
def test_norm(shape, dtype):
    operands = norm_cases.make(shape, dtype)
    close(modulated_norm(*moved(operands), fp8=True), norm_reference(*operands, fp8=True))


@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[:2])  # the interpreter cuts bfloat16 off, not rounds it
@pytest.mark.parametrize("shape", residual_cases.SHAPES)
def test_residual(shape, dtype):
    x, y, *factors = residual_cases.make(shape, dtype)
    found_x, found = gated_residual(*moved((x.clone(), y, *factors)), fp8=True)
    expected_x, expected = residual_reference(x.clone(), y, *factors, fp8=True)
    # a sum rounded to 16 bits may fall to either side of a tie; in float32 the two agree to the last bit or so
    assert float((found_x.cpu().float() - expected_x.float()).abs().max()) <= 2e-2
    close(found, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 8, 12), (1, 3, 5, 7)])
def test_flow_to_x0(shape, kind):
    x, flow = torch.randn(shape), torch.randn(shape).to(kind)
    sigma = float(torch.tensor(0.9375))
    found = flow_to_x0(*moved((x, flow)), sigma).cpu()
    assert torch.equal(found, flow_reference(x, flow, sigma))  # both in float64, rounded once


@pytest.mark.parametrize("shape", [(3, 16, 8, 12), (1, 3, 5, 7)])
def test_renoise(shape, measure):
    x0, noise = torch.randn(shape), torch.randn(shape)
    sigma = float(torch.tensor(0.8333))
    found = renoise(*moved((x0, noise)), sigma).cpu()
    assert measure(found, renoise_reference(x0.double(), noise.double(), sigma)) < 1e-6  # two products, one sum


# One pool a test: the interpreter takes seconds for the longer ones.
ATTENTION = (
    attention_cases.Shape(24, 3, 6, 2, 32),
    attention_cases.Shape(70, 1, 3, 1, 128),  # head size of Wan 2.1; the last keys fill no tile
    attention_cases.Shape(9, 3, 5, 2, 22),  # odd
    attention_cases.Shape(1, 1, 1, 1, 2),  # smallest
)


@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[:2])
@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize("wide", [True, False])
def test_attention(shape, dtype, wide):
    q, k, v, *table = attention_cases.make(shape, dtype, unused=shape.slots > 4)
    k8, v8, scales = attention_cases.narrow(k, v)
    scales["v_scale"].mul_(torch.logspace(-2, 1, len(scales["v_scale"]))[:, None])  # pages of very different sizes
    scales["k_scale"].mul_(torch.logspace(-1, 0, len(scales["k_scale"]))[:, None])
    expected = attention_reference(q.double(), k8, v8, *table, **scales)
    named = dict(zip(scales, moved(scales.values()), strict=True))
    found = paged_attention(*moved((q, k8, v8, *table)), **named, wide=wide)
    assert found.dtype == dtype and found.shape == q.shape
    half = max(attention_cases.HALF_TOLERANCE, 2**-9 if dtype == torch.bfloat16 else 0)  # of the result in bfloat16
    assert rms(found, expected) < (half if wide else attention_cases.FP8_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[:2])
@pytest.mark.parametrize("shape", store_cases.SHAPES)
@pytest.mark.parametrize("with_query", [True, False])
def test_store(shape, dtype, with_query):
    _, operands, scales = store_cases.make_narrow(shape, dtype)
    named = {name: scale.to(DEVICE) for name, scale in scales.items()}
    # a copy keeps the strides of the values, whose tokens are side by side
    ours = moved(operands) if GPU else tuple(t.clone() if torch.is_tensor(t) else t for t in operands)
    query, mean = qk_norm_rope_store(*(ours if with_query else (None, *ours[1:])), **named)
    expected_query, expected_mean = store_reference(*operands, **scales)
    # a key of 16 bits may be rounded to either side before it comes to e4m3; if it is the largest, the scale moves too
    near(ours[5], operands[5], 0.05)
    near(ours[6], operands[6], 0)  # values are only scaled and rounded
    for name, scale in named.items():
        assert float((scale.cpu() / scales[name] - 1).abs().max()) < (1e-5 if dtype == torch.float32 else 1e-2)
    size = float(operands[5].float().abs().max() * scales["k_scale"].max())
    assert float((mean.cpu() - expected_mean).abs().max()) / size < store_cases.MEAN_TOLERANCE[dtype]
    assert (query is not None) == with_query
    if with_query:
        assert rms(query, expected_query.double()) < store_cases.TOLERANCE[dtype]
