"""The kernel bench at toy size: every implementation is checked, then timed, and a wrong one is not."""

from __future__ import annotations

import json

import pytest
import torch

from cfengine.bench import kernels
from cfengine.bench.ceilings import Ceilings
from cfengine.bench.chunk_rows import norm
from cfengine.bench.page_rows import attention, updates
from cfengine.bench.rows import TOLERANCE, Maker
from cfengine.bench.synthetic import SIZES
from cfengine.errors import CFEngineError
from cfengine.ops import OPERATIONS, reference

pytestmark = pytest.mark.cpu

CEILINGS = Ceilings(bandwidth=1e10, gemm={"fp32": 1e11, "bf16": 1e11})


def test_every_row_of_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device, seconds: CEILINGS)
    path = tmp_path / "records.json"
    words = ["--device", "cpu", "--precision", "fp32,bf16,fp8", "--seconds", "0.001", "--json", str(path)]
    assert kernels.main(words) == 0
    records = json.loads(path.read_text())
    names = [entry["name"] for entry in records]
    assert len(names) == len(set(names))
    rows = {entry["name"]: entry for entry in records if entry["name"].startswith("kernel_")}
    for op in OPERATIONS:
        assert any(name.startswith(f"kernel_{op}_") for name in rows), op
    for entry in rows.values():
        shape = entry["config"]
        assert entry["value"] > 0 and shape["error"] <= shape["tolerance"] and shape["timed_by"] == "clock"
        assert shape["share_of_ceiling"] > 0 and shape["ceiling"] in ("copy", "products")
    fast = rows["kernel_paged_attention_21_slots_fp32_reference"]["config"]
    assert fast["over_library"] > 0 and fast["over_reference"] is None
    assert "paged_attention_21_slots_bf16_reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "op", ["slow_fast_update", "slow_fast_paper_update", "slow_fast_diverse_update", "window_update"]
)
def test_rules_are_checked_in_a_memory_that_has_filled(op):
    """A rule that forgets one page is found; what is compared holds the table and the integers beside it."""
    maker = Maker(SIZES["toy"], "cpu", "fp32")
    (row,) = [row for row in updates(maker) if row.op == op]
    operands = row.operands(0)
    table = operands[0]
    assert int(table.count) == maker.config.memory.slots and int(table.seen) == int(operands[-2])
    right = kernels.expected(row, operands)
    assert len(right) == len(table) + (op != "slow_fast_update")
    call = reference(op)
    assert kernels.check(row, call, operands, right) == 0.0

    def forgetful(table, *rest, **options):
        call(table, *rest, **options)
        table.page_ids[3] = 0

    with pytest.raises(CFEngineError, match=f"{op} .* is off by"):
        kernels.check(row, forgetful, operands, right)


def test_work_of_attention_is_counted_from_its_shape():
    maker = Maker(SIZES["toy"], "cpu", "bf16")
    row = attention(maker, 12)
    tokens, keys, width = maker.tokens, 12 * SIZES["toy"].page_tokens, 128
    assert row.flops == 4 * tokens * keys * width
    assert row.traffic == 2 * (2 * tokens * width + 2 * keys * width)


@pytest.mark.parametrize("fault", [1.1, float("nan")])
def test_a_wrong_kernel_is_not_timed(monkeypatch, fault):
    row = norm(Maker(SIZES["toy"], "cpu", "fp32"))
    right = kernels.load
    monkeypatch.setattr(kernels, "load", lambda op, c: lambda *a, **k: right(op, c)(*a, **k) * fault)
    said = []
    records = kernels.row_records(row, "cpu", CEILINGS, 0.001, said.append)
    assert records and all(entry["value"] is None and "off by" in entry["config"]["problem"] for entry in records)
    assert all("no speed is reported" in text for text in said)


def test_an_implementation_that_does_not_load_is_left_out(monkeypatch):
    from cfengine.errors import KernelError

    def missing(op, candidate):
        raise KernelError(f"{op}: implementation {candidate.name!r} is not available")

    row = norm(Maker(SIZES["toy"], "cpu", "fp32"))
    monkeypatch.setattr(kernels, "load", missing)
    said = []
    assert kernels.row_records(row, "cpu", CEILINGS, 0.001, said.append) == []
    assert all("left out" in text for text in said)


def test_errors_are_relative_to_the_largest_value():
    right = [torch.tensor([1.0, 4.0]), torch.tensor([0.5])]
    assert kernels.error([torch.tensor([1.0, 4.4]), torch.tensor([0.5])], right) == pytest.approx(0.1)
    assert TOLERANCE["fp32"] < TOLERANCE["bf16"] < TOLERANCE["fp8"]


def test_unknown_operations_are_named(capsys):
    assert kernels.main(["--device", "cpu", "--op", "warp"]) == 1
    assert "unknown operation 'warp'" in capsys.readouterr().err


def test_copies_keep_the_layout_of_pages():
    pages = Maker(SIZES["toy"], "cpu", "fp8").pool(0)
    values = pages.v[0]
    assert values.stride(1) == 1 and not values.is_contiguous()  # tokens side by side, padded
    (copy,) = kernels.copied((values,))
    assert copy.stride() == values.stride() and copy.data_ptr() != values.data_ptr()
    assert torch.equal(copy.view(torch.uint8), values.view(torch.uint8))
