"""The paper's rule in Triton against the Python rule, integer for integer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cfengine.errors import KernelError
from cfengine.kernels.slow_fast_paper_update.cases import RULES, passes, rule
from cfengine.kernels.slow_fast_paper_update.reference import PaperRule
from cfengine.kernels.slow_fast_paper_update.reference import slow_fast_paper_update as reference
from cfengine.kernels.slow_fast_update.cases import empty_table
from cfengine.kernels.slow_fast_update.reference import SlowFastTable

pytest.importorskip("triton", reason="pip install triton")
from cfengine.kernels.slow_fast_paper_update.triton import slow_fast_paper_update  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DIM = 24
pytestmark = [pytest.mark.gpu if GPU else pytest.mark.cpu]


def compare(rules: PaperRule, chunks: int, seed: int) -> list[int]:
    """Drive both with the same passes; return how often each action was taken."""
    found, expected = SlowFastTable(*(t.to(DEVICE) for t in empty_table(rules, DIM))), empty_table(rules, DIM)
    marked = torch.zeros(rules.slots, dtype=torch.int32)
    ours_marked = marked.clone().to(DEVICE)
    actions = [0, 0, 0]
    for key, start, clean in passes(rules, chunks, DIM, seed):
        at = torch.tensor([start], dtype=torch.int32, device=DEVICE)
        slow_fast_paper_update(found, ours_marked, key.to(DEVICE), at, rules, clean=clean)
        reference(expected, marked, key, start, rules, clean=clean)
        assert ours_marked.tolist() == marked.tolist()
        for name, ours, theirs in zip(SlowFastTable._fields, found, expected, strict=True):
            ours = ours.cpu()
            if name == "similarity":
                # both sum in float64, in another order, and round to float32 once
                assert math.isnan(ours) == math.isnan(theirs) and (math.isnan(ours) or abs(ours - theirs) < 1e-6)
            else:
                assert torch.equal(ours, theirs), f"{name} at frame {start}: {ours.tolist()} != {theirs.tolist()}"
        actions[int(expected.decision[3])] += 1
    return actions


@pytest.mark.parametrize("rules", RULES)
def test_matches_the_python_rule(rules):
    actions = compare(rules, 8, seed=0)
    assert bool(sum(actions[1:])) == bool(rules.slow)  # the plan exercises the rule


def test_every_action_is_seen():
    assert all(compare(RULES[1], 12, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))  # no hypothesis: on a GPU this runs without it
def test_random_rules(seed):
    draw = np.random.default_rng(seed).integers((0, 0, 0, 1, 4), (6, 7, 6, 5, 31))
    sink, slow, extra, chunk_frames, rope_length = map(int, draw)
    compare(rule(sink, slow, chunk_frames + extra, chunk_frames, rope_length), 7, seed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table, marked: (table, marked[:-1]), ["length of marked is 20", "21"]),
        (lambda table, marked: (table, marked.float()), ["marked is float32", "int32"]),
        (lambda table, marked: (table._replace(seen=table.seen.long()), marked), ["seen is int64", "int32"]),
    ],
)
def test_bad_operands(change, words):
    table = SlowFastTable(*(t.to(DEVICE) for t in empty_table(RULES[0], DIM)))
    table, marked = change(table, torch.zeros(21, dtype=torch.int32, device=DEVICE))
    with pytest.raises(KernelError) as caught:
        slow_fast_paper_update(table, marked, torch.ones(DIM, device=DEVICE), 0, RULES[0], clean=True)
    for word in ("slow_fast_paper_update", *words):
        assert word in str(caught.value)
