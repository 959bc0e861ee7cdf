"""The rule that drops what slow memory holds twice: on a device against Python, and read by no host."""

from __future__ import annotations

import pytest
import torch

from cfengine.errors import KernelError
from cfengine.kernels.slow_fast_diverse_update.reference import likest, put_first_to_leave
from cfengine.kernels.slow_fast_diverse_update.reference import slow_fast_diverse_update as reference
from cfengine.kernels.slow_fast_paper_update.cases import RULES, passes
from cfengine.kernels.slow_fast_update.cases import empty_table
from cfengine.kernels.slow_fast_update.reference import SlowFastTable

pytest.importorskip("triton", reason="pip install triton")
from cfengine.kernels.slow_fast_diverse_update.triton import slow_fast_diverse_update  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DIM = 24
pytestmark = [pytest.mark.gpu if GPU else pytest.mark.cpu]


def beside(rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Marks and descriptors of a memory that has seen nothing."""
    return torch.zeros(rule.slots, dtype=torch.int32), torch.zeros(rule.slots + rule.chunk_frames + 1, DIM)


# interpreted kernels are slow: the smallest slow memory, one that holds nothing, a large sink
@pytest.mark.slow
@pytest.mark.parametrize("rule", [RULES[1], RULES[2], RULES[4]])
def test_matches_the_python_rule(rule):
    table, expected = (empty_table(rule, DIM) for _ in range(2))
    found = SlowFastTable(*(tensor.to(DEVICE) for tensor in table))
    ours, theirs = [tensor.to(DEVICE) for tensor in beside(rule)], beside(rule)
    for key, start, clean in passes(rule, 12, DIM, seed=2):
        at = torch.tensor([start], dtype=torch.int32, device=DEVICE)
        slow_fast_diverse_update(found, *ours, key.to(DEVICE), at, rule, clean=clean)
        reference(expected, *theirs, key, start, rule, clean=clean)
        for name, mine, other in zip(
            (*SlowFastTable._fields, "marked", "descriptors"), (*found, *ours), (*expected, *theirs), strict=True
        ):
            # a similarity is a sum in float64, in another order, rounded to float32 once
            near = {"rtol": 0, "atol": 1e-6 if name == "similarity" else 0}
            torch.testing.assert_close(mine.cpu(), other, equal_nan=True, **near, msg=lambda m, n=name: f"{n}: {m}")


def test_the_host_reads_nothing(no_reads):
    """A captured graph holds the order of the slow pages: no value leaves the device, whatever the memory holds."""
    rule = RULES[1]
    table = empty_table(rule, DIM)
    marked, descriptors = beside(rule)
    for key, start, clean in passes(rule, 12, DIM, seed=2):
        at = torch.tensor([start], dtype=torch.int32)
        held = [tensor.clone() for tensor in (*table, marked, descriptors)]
        with no_reads:
            put_first_to_leave(SlowFastTable(*held[:11]), *held[11:], key, at, rule, clean=clean)
        reference(table, marked, descriptors, key, start, rule, clean=clean)
    assert int(table.promoted) == rule.slow


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([[1, 0], [0, 1], [3, 1e-3]], 0),  # lengths do not count
        ([[1, 0], [0, 1], [-1, 0], [0, 2]], 1),
        ([[0, 1], [1, 0], [1, 0], [0, 1]], 0),  # of equal pairs the one with the oldest page
        ([[0, 0], [0, 0], [1, 0]], 0),  # nothing known: the oldest
        ([[1, 0], [-1, 0]], 0),  # never the last, however unlike
    ],
)
def test_the_likest_pair(rows, place):
    assert int(likest(torch.tensor(rows, dtype=torch.float32, device=DEVICE))) == place


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_copies_tie_whatever_the_rounding(scale):
    """Copies of one page at three places, among others: their cosines are 1 but for the last bit."""
    rows = torch.randn(9, 1536, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    rows[[2, 5, 8]] = rows[2] * torch.tensor([1.0, 2.0, 4.0])[:, None] * scale
    assert int(likest(rows.to(DEVICE))) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d[:-1], ["rows of descriptors is 24", "25"]),
        (lambda d: d.double(), ["descriptors is float64", "float32"]),
    ],
)
def test_bad_operands(change, words):
    table = SlowFastTable(*(tensor.to(DEVICE) for tensor in empty_table(RULES[0], DIM)))
    marked, descriptors = (tensor.to(DEVICE) for tensor in beside(RULES[0]))
    with pytest.raises(KernelError) as caught:
        slow_fast_diverse_update(
            table, marked, change(descriptors), torch.ones(DIM, device=DEVICE), 0, RULES[0], clean=True
        )
    for word in ("slow_fast_diverse_update", *words):
        assert word in str(caught.value)
