"""The compiled Slow-Fast rule against the reference, integer for integer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cfengine.errors import KernelError
from cfengine.kernels.slow_fast_update.cases import RULES, empty_table, passes, rule
from cfengine.kernels.slow_fast_update.reference import SlowFastTable
from cfengine.kernels.slow_fast_update.reference import slow_fast_update as reference

pytest.importorskip("cfengine._C", reason="pip install -e . with a C++ compiler and cmake present")
from cfengine.kernels.slow_fast_update.cpu import slow_fast_update as kernel  # noqa: E402

pytestmark = pytest.mark.cpu
DIM = 24


def compare(rules, chunks, seed):
    """Drive both with the same passes; return how often each action was taken."""
    found, expected = empty_table(rules, DIM), empty_table(rules, DIM)
    actions = [0, 0, 0]
    for key, start in passes(rules, chunks, DIM, seed):
        kernel(found, key, start, rules)
        reference(expected, key, start, rules)
        for name, ours, theirs in zip(SlowFastTable._fields, found, expected, strict=True):
            if name == "similarity":
                # Both sum in float64, in another order, and round to float32 once.
                assert math.isnan(ours) == math.isnan(theirs) and (math.isnan(ours) or abs(ours - theirs) < 1e-6)
            else:
                assert torch.equal(ours, theirs), f"{name} at frame {start}: {ours.tolist()} != {theirs.tolist()}"
        actions[int(found.decision[3])] += 1
    return actions


@pytest.mark.parametrize("rules", RULES)
def test_matches_reference(rules):
    actions = compare(rules, 40, seed=0)
    assert actions[0] and sum(actions[1:])  # the plan exercises the rule


def test_every_action_is_seen():
    assert all(compare(RULES[0], 40, seed=0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sink=st.integers(0, 4),
    slow=st.integers(0, 8),
    extra=st.integers(0, 5),
    chunk_frames=st.integers(1, 4),
    keep=st.integers(0, 3),
    rope_length=st.integers(4, 30),
    interval=st.sampled_from([0, 0, 2, 6]),
    seed=st.integers(0, 1000),
)
def test_random_rules(sink, slow, extra, chunk_frames, keep, rope_length, interval, seed):
    assume(keep <= min(chunk_frames, max(slow, 1)) and sink + slow + extra >= chunk_frames)
    compare(rule(sink, slow, chunk_frames + extra, chunk_frames, keep, rope_length, 0.95, interval), 12, seed)


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("page_ids", lambda t: t.long(), ["page_ids is int64", "int32"]),
        ("page_ids", lambda t: t[:-1], ["length of page_ids is 20", "21"]),
        ("page_ids", lambda t: t + 99, ["page_ids[0] is 99", "below 25"]),
        ("last_key", lambda t: t[:-1], ["length of last_key is 23", "24"]),
        ("similarity", lambda t: t.double(), ["similarity is float64", "float32"]),
        ("seen", lambda t: t - 60, ["slot 63 of 21", "in order"]),
        ("count", lambda t: t + 99, ["count[0] is 99", "below 22"]),
    ],
)
def test_bad_tables(field, change, words):
    table = empty_table(RULES[0], DIM)
    with pytest.raises(KernelError) as caught:
        kernel(table._replace(**{field: change(getattr(table, field))}), torch.ones(DIM), 0, RULES[0])
    for word in words:
        assert word in str(caught.value)


def test_bad_rule_leaves_the_table_alone():
    wrong = rule(keep=2, chunk_frames=1, fast=3)
    table = empty_table(wrong, DIM)
    with pytest.raises(KernelError, match="keep is 2 but a chunk has 1"):
        kernel(table, torch.ones(DIM), 0, wrong)
    assert all(torch.equal(a, b) for a, b in zip(table, empty_table(wrong, DIM), strict=True))
