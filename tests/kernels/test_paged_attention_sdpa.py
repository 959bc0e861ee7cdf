"""Attention through torch's own, for every number of slots in use: right, and without a word to the host."""

from __future__ import annotations

import pytest
import torch

from cfengine.kernels.paged_attention import cases
from cfengine.kernels.paged_attention.reference import paged_attention as reference
from cfengine.kernels.paged_attention.sdpa import paged_attention as sdpa

pytestmark = pytest.mark.cpu

SHAPE = cases.Shape(9, 3, 7, 2, 22)  # leaves remainders everywhere


def operands_at(count: int, dtype: torch.dtype = torch.float32):
    """Operands of a table with `count` slots in use, whose pages not shown hold no numbers at all."""
    q, k, v, ids, *rest = cases.make(SHAPE, dtype, seed=count, unused=SHAPE.slots - count)
    for pages in (k, v):
        pages[ids[count:].long()] = float("nan")
    return q, k, v, ids, *rest


@pytest.mark.parametrize("count", range(1, SHAPE.slots + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_slots(count, dtype, measure, widen):
    operands = operands_at(count, dtype)
    assert measure(sdpa(*operands), reference(*widen(operands))) < cases.TOLERANCE[dtype]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("count", range(1, SHAPE.slots + 1))
def test_every_number_of_slots_in_e4m3(count, wide):
    q, k, v, ids, *rest = cases.make(SHAPE, torch.float32, seed=count, unused=SHAPE.slots - count)
    k, v, scales = cases.narrow(k, v)
    for scale in scales.values():
        scale[ids[count:].long()] = float("nan")
    expected = reference(q.double(), k, v, ids, *rest, **scales)
    error = (sdpa(q, k, v, ids, *rest, **scales, wide=wide) - expected).abs().max() / expected.abs().max()
    assert error < cases.TOLERANCE[torch.float32]


def test_nothing_is_read_on_the_host(no_reads):
    """One captured graph then serves every number; a memory that fills moves no tensor but the number."""
    operands = operands_at(3)
    sdpa(*operands)  # turning rates reach the device with the first call
    with no_reads:
        before = sdpa(*operands)
        operands[5].fill_(2)
        after = sdpa(*operands)
    assert not torch.equal(before, after)
