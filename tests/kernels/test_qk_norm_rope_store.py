"""The page writer on the CPU against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfengine.errors import KernelError
from cfengine.kernels.qk_norm_rope_store.cases import MEAN_TOLERANCE, SHAPES, TOLERANCE, Shape, make
from cfengine.kernels.qk_norm_rope_store.reference import qk_norm_rope_store as reference

pytestmark = pytest.mark.cpu
DTYPES = (torch.float32, torch.bfloat16)


def kernel(*operands, **options):
    from cfengine.kernels.qk_norm_rope_store.cpu import qk_norm_rope_store

    return qk_norm_rope_store(*operands, **options)


def compare(shape, dtype, seed, measure, widen, with_query=True):
    operands = make(shape, dtype, seed)
    wide = widen(operands)
    if not with_query:
        operands = (None, *operands[1:])
    query, mean = kernel(*operands)
    expected_query, expected_mean = reference(*wide)
    assert measure(operands[5], wide[5]) < TOLERANCE[dtype]
    assert torch.equal(operands[6].double(), wide[6])  # values are copied
    assert mean.dtype == torch.float32
    # Against the size of a key, not of the mean: keys of both signs cancel in it.
    size = float(wide[5].abs().max())
    assert float((mean.double() - expected_mean).abs().max()) / size < MEAN_TOLERANCE[dtype]
    if with_query:
        assert query.dtype == dtype and measure(query, expected_query) < TOLERANCE[dtype]
    else:
        assert query is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_query", [True, False])
def test_matches_reference(isa, shape, dtype, with_query, measure, widen):
    compare(shape, dtype, 0, measure, widen, with_query)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.builds(
        Shape,
        grid=st.tuples(st.integers(1, 6), st.integers(1, 7)),
        frames=st.integers(1, 4),
        heads=st.integers(1, 3),
        head_dim=st.integers(1, 40).map(lambda half: 2 * half),
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_random_shapes(isa, shape, dtype, measure, widen):
    compare(shape, dtype, 1, measure, widen)


def test_mean_does_not_depend_on_threads(isa):
    before = torch.get_num_threads()
    shape = Shape((10, 13), 3, 3, 64)
    try:
        torch.set_num_threads(1)
        _, alone = kernel(*make(shape, torch.float32))
        torch.set_num_threads(3)
        _, together = kernel(*make(shape, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_rows_and_columns_are_not_exchanged(isa, measure, widen):
    operands = make(Shape((3, 5), 1, 1, 32), torch.float32)
    wide = widen(operands)
    kernel(*operands[:-1], (5, 3))
    reference(*wide)
    assert measure(operands[5], wide[5]) > 0.01


def test_other_pages_are_untouched(isa):
    operands = make(SHAPES[0], torch.float32)
    kernel(*operands)
    written = set(operands[7].tolist())
    for page in range(operands[5].shape[0]):
        assert bool(operands[5][page].any()) == (page in written)
        assert bool(operands[6][page].any()) == (page in written)


def test_pages_side_by_side(isa):
    q, k, v, norm_q, norm_k, k_pages, v_pages, ids, grid = make(SHAPES[2], torch.float32)
    both = torch.stack([k_pages, v_pages], dim=1)
    kernel(q, k, v, norm_q, norm_k, both[:, 0], both[:, 1], ids, grid)
    kernel(q, k, v, norm_q, norm_k, k_pages, v_pages, ids, grid)
    assert torch.equal(both[:, 0], k_pages) and torch.equal(both[:, 1], v_pages)


def swapped(position, change):
    operands = list(make(SHAPES[0], torch.float32))
    operands[position] = change(operands[position])
    return operands


@pytest.mark.parametrize(
    ("position", "change", "words"),
    [
        (0, lambda q: q.bfloat16(), ["q is bfloat16", "float32"]),
        (0, lambda q: q[:-1], ["tokens of q is 71", "72"]),
        (1, lambda k: k.half(), ["k is float16", "float32 or bfloat16"]),
        (1, lambda k: k[:, :-2], ["width of k is 190", "192"]),
        (2, lambda v: v.unflatten(1, (6, 32)), ["v has 3 axes", "2"]),
        (4, lambda w: w[:-1], ["length of norm_k is 191", "192"]),
        (5, lambda pages: pages.bfloat16(), ["k_pages is bfloat16", "float32"]),
        (6, lambda pages: pages[:, :-1], ["page_tokens of v_pages is 23", "24"]),
        (7, lambda ids: ids[:-1], ["tokens of k is 72", "48"]),
        (7, lambda ids: ids + 9, ["page_ids[0] is ", "below 5"]),
        (8, lambda grid: (4, 5), ["rows x columns of grid is 20", "24"]),
    ],
)
def test_bad_operands(isa, position, change, words):
    with pytest.raises(KernelError) as caught:
        kernel(*swapped(position, change))
    for word in words:
        assert word in str(caught.value)
