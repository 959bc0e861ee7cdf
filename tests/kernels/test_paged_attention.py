"""Paged attention on the CPU against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfengine.errors import KernelError
from cfengine.kernels.paged_attention.cases import SHAPES, TOLERANCE, Shape, make
from cfengine.kernels.paged_attention.reference import paged_attention as reference

pytestmark = pytest.mark.cpu
DTYPES = (torch.float32, torch.bfloat16)


def kernel(*operands, **options):
    from cfengine.kernels.paged_attention.cpu import paged_attention

    return paged_attention(*operands, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(isa, shape, dtype, measure, widen):
    operands = make(shape, dtype)
    found = kernel(*operands)
    assert found.dtype == dtype and found.shape == operands[0].shape
    assert measure(found, reference(*widen(operands))) < TOLERANCE[dtype]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.builds(
        Shape,
        page_tokens=st.integers(1, 70),
        frames=st.integers(1, 4),
        slots=st.integers(4, 9),
        heads=st.integers(1, 3),
        head_dim=st.integers(1, 40).map(lambda half: 2 * half),
    ),
    unused=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_random_shapes(isa, shape, unused, dtype, measure, widen):
    operands = make(shape, dtype, seed=1, unused=unused)
    assert measure(kernel(*operands), reference(*widen(operands))) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [32, 22])
def test_positions_in_the_millions(isa, head_dim, measure, widen):
    operands = make(Shape(12, 3, 6, 2, head_dim), torch.float32, first_position=5_000_000)
    assert measure(kernel(*operands), reference(*widen(operands))) < TOLERANCE[torch.float32]
    near = make(Shape(12, 3, 6, 2, head_dim), torch.float32)
    assert torch.equal(kernel(*operands), kernel(*near))  # only differences enter


def test_positions_matter(isa, measure, widen):
    """The tolerance is tight enough to see one page one step away."""
    operands = make(SHAPES[0], torch.float32)
    moved = [t.clone() for t in operands]
    moved[4][5] += 1
    assert measure(kernel(*moved), reference(*widen(operands))) > 100 * TOLERANCE[torch.float32]


def test_strides(isa):
    """Keys and values side by side in one pool, heads outside tokens, queries a slice: the numbers stay."""
    q, k, v, *table = make(SHAPES[3], torch.float32)
    both = torch.stack([k, v], dim=1)
    outside = v.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([q, q], dim=1)[:, : q.shape[1]]
    assert torch.equal(kernel(wide, both[:, 0], outside, *table), kernel(q, k, v, *table))


def test_large_scores_do_not_overflow(isa, measure, widen):
    operands = make(SHAPES[0], torch.float32)
    operands[0].mul_(40)  # scores of several hundred: 2^score is far beyond float32
    assert measure(kernel(*operands), reference(*widen(operands))) < 20 * TOLERANCE[torch.float32]  # scores 40 x larger


def test_pages_beyond_count_are_not_read(isa):
    operands = make(SHAPES[0], torch.float32, unused=4)
    expected = kernel(*operands)
    for pages in operands[1:3]:
        pages[operands[3][-4:].long()] = float("nan")
    assert torch.equal(kernel(*operands), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_numbers(isa, threads):
    operands = make(SHAPES[1], torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kernel(*operands)
        torch.set_num_threads(threads)
        assert torch.equal(kernel(*operands), alone)
    finally:
        torch.set_num_threads(before)


def swapped(position, change):
    operands = list(make(Shape(6, 2, 4, 2, 8), torch.float32))
    operands[position] = change(operands[position])
    return operands


@pytest.mark.parametrize(
    ("position", "change", "words"),
    [
        (0, lambda q: q.double(), ["q is float64", "float32 or bfloat16", "cast"]),
        (0, lambda q: q[:, :1], ["heads of k_pages is 2", "is 1"]),
        (0, lambda q: q[:11], ["11", "multiple", "2"]),
        (0, lambda q: q.flatten(1), ["q has 2 axes", "3"]),
        (1, lambda k: k.bfloat16(), ["k_pages is bfloat16", "float32"]),
        (1, lambda k: k[..., :6], ["head_dim of k_pages is 6", "8"]),
        (1, lambda k: k.transpose(2, 3).contiguous().transpose(2, 3), ["last stride of k_pages is 2"]),
        (2, lambda v: v[:-1], ["pages of v_pages is 6", "is 7"]),
        (3, lambda ids: ids.long(), ["page_ids is int64", "int32"]),
        (3, lambda ids: ids + 100, ["page_ids[0] is 10", "below 7"]),
        (3, lambda ids: ids - 50, ["page_ids[0] is -", "at least 0"]),
        (4, lambda positions: positions[:-1], ["length of positions is 3", "is 4"]),
        (5, lambda count: count + 1, ["count[0] is 5", "below 5"]),
        (5, lambda count: count * 0, ["count[0] is 0", "at least 1"]),
    ],
)
def test_bad_operands(isa, position, change, words):
    with pytest.raises(KernelError) as caught:
        kernel(*swapped(position, change))
    for word in words:
        assert word in str(caught.value)
