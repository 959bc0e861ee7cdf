"""The table of operations: what is chosen, what is refused, what a graph can hold."""

from __future__ import annotations

import pytest

from cfengine import ops
from cfengine.errors import KernelError

pytestmark = pytest.mark.cpu


def test_every_operation_has_a_reference_everywhere():
    for op in ops.OPERATIONS:
        for device in ("cpu", "cuda"):
            assert "reference" in [candidate.name for candidate in ops.row(op, device)]
        assert ops.reference(op).__name__ == op


def test_e4m3_skips_what_does_not_take_it():
    names = ops.select("cpu", fp8=True).names
    for op in ("paged_attention", "qk_norm_rope_store", "modulated_norm", "gated_residual"):
        assert names[op] == "reference"


def test_a_forced_choice_that_takes_no_e4m3_is_refused():
    with pytest.raises(KernelError, match="paged_attention has no implementation 'cpu' on cpu that takes e4m3"):
        ops.select("cpu", {"paged_attention": "cpu"}, fp8=True)


def test_rounding_is_never_chosen_unasked():
    assert ops.select("cpu").names["paged_attention"] != "rounding"
    chosen = ops.select("cpu", {"paged_attention": "rounding"}, fp8=True)
    assert chosen.names["paged_attention"] == "rounding"


def test_what_a_graph_can_hold():
    def captured(op, name):
        return next(candidate.captured for candidate in ops.row(op, "cuda") if candidate.name == name)

    assert captured("paged_attention", "triton") and captured("paged_attention", "sdpa")
    assert captured("linear_fp8", "scaled_mm") and not captured("slow_fast_update", "reference")


def test_a_reference_for_want_of_better_is_reported(monkeypatch):
    """Only where plain torch serves; the next best kernel is no reason to warn."""
    row = (ops.Candidate("cuda", "cfengine.absent"), ops.Candidate("triton", "x"), ops.Candidate("reference", "y"))
    monkeypatch.setitem(ops.TABLE, ("paged_attention", "cuda"), row)
    assert ops.not_built("cuda", {"paged_attention": "reference"}) == ["paged_attention"]
    assert ops.not_built("cuda", {"paged_attention": "triton"}) == []
