"""Triton kernels against their float64 references: on the GPU where there is one, else in Triton's interpreter.

bfloat16 is left to the GPU: the interpreter of Triton 3.9 multiplies bfloat16 matrices wrongly.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cfengine.kernels.gated_residual import cases as residual_cases
from cfengine.kernels.gated_residual.reference import gated_residual as residual_reference
from cfengine.kernels.modulated_norm import cases as norm_cases
from cfengine.kernels.modulated_norm.reference import modulated_norm as norm_reference
from cfengine.kernels.paged_attention import cases as attention_cases
from cfengine.kernels.paged_attention.reference import paged_attention as attention_reference
from cfengine.kernels.qk_norm_rope_store import cases as store_cases
from cfengine.kernels.qk_norm_rope_store.reference import qk_norm_rope_store as store_reference
from cfengine.kernels.slow_fast_update.cases import RULES, empty_table, passes
from cfengine.kernels.slow_fast_update.reference import SlowFastTable
from cfengine.kernels.slow_fast_update.reference import slow_fast_update as update_reference

pytest.importorskip("triton", reason="pip install triton")
from cfengine.kernels.gated_residual.triton import gated_residual  # noqa: E402
from cfengine.kernels.modulated_norm.triton import modulated_norm  # noqa: E402
from cfengine.kernels.paged_attention.triton import paged_attention  # noqa: E402
from cfengine.kernels.qk_norm_rope_store.triton import qk_norm_rope_store  # noqa: E402
from cfengine.kernels.slow_fast_update.triton import slow_fast_update  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
pytestmark = [pytest.mark.gpu if GPU else pytest.mark.cpu]
# drawn from a seed, not by hypothesis: on a GPU these run where it is not installed
RANDOM = pytest.mark.parametrize("seed", range(8))


def moved(operands):
    return tuple(t.to(DEVICE) if torch.is_tensor(t) else t for t in operands)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", attention_cases.SHAPES)
def test_attention(shape, dtype, measure, widen):
    operands = attention_cases.make(shape, dtype)
    found = paged_attention(*moved(operands)).cpu()
    assert found.dtype == dtype and found.shape == operands[0].shape
    assert measure(found, attention_reference(*widen(operands))) < attention_cases.TOLERANCE[dtype]


@RANDOM
def test_attention_over_random_shapes(seed, measure, widen):
    draw = np.random.default_rng(seed)
    page_tokens, frames, slots, heads, half, unused = map(int, draw.integers((1, 1, 4, 1, 1, 0), (71, 5, 7, 3, 41, 4)))
    shape = attention_cases.Shape(page_tokens=page_tokens, frames=frames, slots=slots, heads=heads, head_dim=2 * half)
    dtype = DTYPES[seed % len(DTYPES)]
    operands = attention_cases.make(shape, dtype, seed=1, unused=unused)
    found = paged_attention(*moved(operands)).cpu()
    assert measure(found, attention_reference(*widen(operands))) < attention_cases.TOLERANCE[dtype]


def test_attention_at_positions_in_the_millions(measure, widen):
    operands = list(attention_cases.make(attention_cases.Shape(12, 3, 6, 2, 32), torch.float32))
    operands[6] += 5_000_000  # far from every key, as a sink is from the queries of an old stream
    found = paged_attention(*moved(operands)).cpu()
    assert measure(found, attention_reference(*widen(operands))) < attention_cases.TOLERANCE[torch.float32]


def test_attention_reads_no_page_beyond_count():
    operands = attention_cases.make(attention_cases.SHAPES[4], torch.float32, unused=2)
    expected = paged_attention(*moved(operands))
    for pages in operands[1:3]:
        pages[operands[3][-2:].long()] = float("nan")
    assert torch.equal(paged_attention(*moved(operands)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", norm_cases.SHAPES)
def test_norm(shape, dtype, measure, widen):
    operands = norm_cases.make(shape, dtype)
    found = modulated_norm(*moved(operands)).cpu()
    assert found.dtype == dtype
    assert measure(found, norm_reference(*widen(operands))) < norm_cases.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", residual_cases.SHAPES)
@pytest.mark.parametrize("parts", ["gate and norm", "gate", "norm"])
def test_residual(shape, dtype, parts, measure, widen):
    x, y, gate, shift, scale = residual_cases.make(shape, dtype)
    gate = gate if "gate" in parts else None
    shift, scale = (shift, scale) if "norm" in parts else (None, None)
    wide = widen((x, y, gate, shift, scale))
    found, normed = gated_residual(*moved((x, y, gate, shift, scale)))
    expected, expected_norm = residual_reference(*wide)
    assert measure(found.cpu(), expected) < residual_cases.TOLERANCE[dtype]
    if shift is None:
        assert normed is None
    else:
        assert measure(normed.cpu(), expected_norm) < residual_cases.TOLERANCE[dtype]


def compare_store(shape, dtype, seed, with_query, measure, widen):
    operands = store_cases.make(shape, dtype, seed)
    wide = widen(operands)
    ours = moved(operands if with_query else (None, *operands[1:]))
    query, mean = qk_norm_rope_store(*ours)
    expected_query, expected_mean = store_reference(*wide)
    assert measure(ours[5].cpu(), wide[5]) < store_cases.TOLERANCE[dtype]
    assert torch.equal(ours[6].cpu().double(), wide[6])  # values are copied
    size = float(wide[5].abs().max())  # of a key: keys of both signs cancel in the mean
    assert float((mean.cpu().double() - expected_mean).abs().max()) / size < store_cases.MEAN_TOLERANCE[dtype]
    if with_query:
        assert measure(query.cpu(), expected_query) < store_cases.TOLERANCE[dtype]
    else:
        assert query is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", store_cases.SHAPES)
@pytest.mark.parametrize("with_query", [True, False])
def test_store(shape, dtype, with_query, measure, widen):
    compare_store(shape, dtype, 0, with_query, measure, widen)


@RANDOM
def test_store_of_random_shapes(seed, measure, widen):
    draw = np.random.default_rng(seed)
    rows, columns, frames, heads, half = map(int, draw.integers(1, (7, 8, 5, 4, 41)))
    shape = store_cases.Shape(grid=(rows, columns), frames=frames, heads=heads, head_dim=2 * half)
    compare_store(shape, DTYPES[seed % len(DTYPES)], 1, True, measure, widen)


@pytest.mark.parametrize("rules", RULES)
def test_slow_fast_rule(rules):
    """Integer for integer, over passes that fill, roll and shift."""
    dim = 24
    found, expected = (empty_table(rules, dim) for _ in range(2))
    found = SlowFastTable(*moved(found))
    actions = [0, 0, 0]
    for key, start in passes(rules, 15, dim, seed=0):
        slow_fast_update(found, key.to(DEVICE), start, rules)
        update_reference(expected, key, start, rules)
        for name, ours, theirs in zip(SlowFastTable._fields, found, expected, strict=True):
            ours = ours.cpu()
            if name == "similarity":
                # both sum in float64, in another order, and round to float32 once
                assert math.isnan(ours) == math.isnan(theirs) and (math.isnan(ours) or abs(ours - theirs) < 1e-6)
            else:
                assert torch.equal(ours, theirs), f"{name} at frame {start}: {ours.tolist()} != {theirs.tolist()}"
        actions[int(expected.decision[3])] += 1
    assert actions[0] and sum(actions[1:])  # the plan exercises the rule
