"""Recorded traces through every implementation, and what replay says of bad files and wrong rules."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfengine import ops
from cfengine.kernels.rows import FILL
from cfengine.memory import policies
from cfengine.testing import replay

pytestmark = pytest.mark.cpu
DATA = Path(__file__).parents[1] / "data"
TRACES = sorted(DATA.glob("*.safetensors"))


@pytest.mark.parametrize("impl", ops.implementations("cpu"))
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_trace(path, impl):
    report = replay.replay(path, ops.select("cpu", prefer=impl))
    assert not report.mismatches, report.mismatches[:5]
    assert report.worst[0] <= replay.TOLERANCE[torch.float32], report.worst
    assert len(report.errors) >= 6  # it did compare something


HALVES = (torch.bfloat16, torch.float16)


# the CPU kernels have no float16
@pytest.mark.parametrize(
    ("impl", "dtype"), [("cpu", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float16)]
)
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_trace_in_16_bits(path, impl, dtype):
    """Every table, action and counter is the recorded one; tensors are as near as their type allows."""
    if impl not in ops.implementations("cpu"):
        pytest.skip(f"implementation {impl!r} is not built: pip install -e .")
    report = replay.replay(path, ops.select("cpu", prefer=impl), dtype=dtype)
    assert not report.mismatches, report.mismatches[:5]
    assert report.worst[0] <= replay.TOLERANCE[dtype], report.worst
    # rounded at all: a trace that had slipped through in float32 would be nearer than half an ulp of 16 bits
    assert report.worst[0] > torch.finfo(dtype).eps / 2, report.worst


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("stem", ["memory_head64", "memory_head128", "dit_cf_roll"])
def test_the_library_attention_replays(stem, dtype):
    sdpa = ops.load("paged_attention", next(c for c in ops.row("paged_attention", "cuda") if c.name == "sdpa"))
    chosen = dataclasses.replace(ops.select("cpu", prefer="reference"), paged_attention=sdpa)
    report = replay.replay(DATA / f"{stem}.safetensors", chosen, dtype=dtype)
    assert not report.failed, (report.mismatches[:5], report.worst)


def edited(tmp_path: Path, stem: str, edit) -> Path:
    """A copy of a trace with `edit(tensors, description)` applied."""
    tensors, description = load_file(DATA / f"{stem}.safetensors"), json.loads((DATA / f"{stem}.json").read_text())
    edit(tensors, description)
    save_file(tensors, tmp_path / f"{stem}.safetensors")
    (tmp_path / f"{stem}.json").write_text(json.dumps(description))
    return tmp_path / f"{stem}.safetensors"


def test_a_wrong_number_is_found(tmp_path, capsys):
    path = edited(tmp_path, "memory_fastmin", lambda tensors, _: tensors["y"][3].mul_(1.01))
    assert replay.main([str(path), "--impl", "reference"]) == 1
    assert "y " in capsys.readouterr().out


def test_a_wrong_action_is_found(tmp_path, capsys):
    def edit(_, description):
        next(s for s in description["steps"] if s["action"] == "fill")["action"] = "roll"

    assert replay.main([str(edited(tmp_path, "memory_fastmin", edit)), "--impl", "reference"]) == 1
    assert "action: fill, expected roll" in capsys.readouterr().out


def repr_on_promotion_only(right, policy, tables, layer, key_mean, step):
    last = tables.layers[layer].last_key.clone()
    right(policy, tables, layer, key_mean, step)
    if not tables.layers[layer].decision[3] and step.start_frame >= policy.rule.fast:
        tables.layers[layer].last_key.copy_(last)


def clean_pass_only(right, policy, tables, layer, key_mean, step):
    right(policy, tables, layer, key_mean if step.clean else tables.layers[layer].last_key.clone(), step)
    tables.layers[layer].last_key.copy_(key_mean)


def layer_zero_decides(right, policy, tables, layer, key_mean, step):
    table = tables.layers[layer]
    if layer == 0:
        policy.first = (table.last_key.clone(), key_mean.clone())
    table.last_key.copy_(policy.first[0])
    right(policy, tables, layer, policy.first[1], step)
    table.last_key.copy_(key_mean)


def last_frame_promoted(right, policy, tables, layer, key_mean, step):
    table, rule = tables.layers[layer], policy.rule
    written = table.spare_ids.clone()
    right(policy, tables, layer, key_mean, step)
    action = int(table.decision[3])
    if action:
        slot = rule.sink + int(table.promoted) - 1 if action == FILL else rule.slots - rule.fast - 1
        table.page_ids[slot] = written[-1]


def absolute_positions(right, policy, tables, layer, key_mean, step):
    right(policy, tables, layer, key_mean, step)
    table = tables.layers[layer]
    table.positions.copy_(table.sources)
    table.q_positions.copy_(step.start_frame + torch.arange(len(table.q_positions), dtype=torch.int32))


WRONG = [
    (repr_on_promotion_only, "memory_base"),
    (clean_pass_only, "memory_base"),
    (layer_zero_decides, "dit_cf_roll"),
    (last_frame_promoted, "memory_base"),
    (absolute_positions, "memory_base"),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("wrong", "stem"), WRONG, ids=[wrong.__name__ for wrong, _ in WRONG])
def test_wrong_rules_are_found(wrong, stem, dtype, monkeypatch):
    """Replay notices an engine whose rule is not the recorded one, in each way that is easy to get wrong.

    By its tensors too, far beyond what rounding explains.
    """
    right = policies.SlowFast.update
    monkeypatch.setattr(policies.SlowFast, "update", lambda self, *args: wrong(right, self, *args))
    report = replay.replay(DATA / f"{stem}.safetensors", ops.select("cpu", prefer="reference"), dtype=dtype)
    assert report.worst[0] > 5 * replay.TOLERANCE[dtype], report.worst


@pytest.mark.parametrize(("dtype", "settled"), [("float32", 0), ("float16", 0), ("bfloat16", 2)])
def test_a_decision_that_a_type_does_not_settle_is_refused(dtype, settled, tmp_path, capsys):
    def edit(_, description):  # 0.0025 above the threshold: float16 errs by 0.0005 at most, bfloat16 by 0.004
        step = next(s for s in description["steps"] if s["sim"] is not None)
        description["threshold"] = step["sim"] - 0.0025

    path = edited(tmp_path, "memory_fastmin", edit)
    assert replay.main([str(path), "--impl", "reference", "--dtype", dtype]) in (settled, settled or 1)
    assert ("bfloat16 does not settle" in capsys.readouterr().err) == bool(settled)


def test_a_gutted_trace_is_refused(tmp_path, capsys):
    def without_layers(_, description):
        for step in description["steps"]:
            step["layers"] = []

    def without_decisions(_, description):
        for step in description["steps"]:
            del step["action"]

    for stem, edit in (("dit_sf", without_layers), ("memory_fastmin", without_decisions)):
        assert replay.main([str(edited(tmp_path, stem, edit))]) == 2
        assert "layers" in (said := capsys.readouterr().err) or "action" in said


def test_summary_line(capsys):
    assert replay.main([str(DATA / "memory_fastmin.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("operations: paged_attention=")
    assert lines[-1].startswith("1 files, 7 tensors, worst ") and "memory_fastmin.safetensors" in lines[-1]


def test_bad_files_are_refused(tmp_path, capsys):
    good = DATA / "memory_fastmin.safetensors"
    alone = tmp_path / "alone.safetensors"
    shutil.copy(good, alone)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:5000])
    shutil.copy(good.with_suffix(".json"), tmp_path / "cut.json")
    odd = edited(tmp_path, "memory_fastmin", lambda _, description: description.update(kind="video"))
    for path, says in (
        (tmp_path / "none.safetensors", "does not exist"),
        (alone, "alone.json"),
        (cut, "safetensors"),
        (odd, "kind"),
    ):
        assert replay.main([str(path)]) == 2
        assert says in capsys.readouterr().err
    bare = edited(tmp_path, "memory_fastmin", lambda tensors, _: tensors.clear())
    assert replay.main([str(bare)]) == 2
    assert "memory_fastmin.safetensors holds no tensors" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert replay.main([str(empty)]) == 2
    assert "no .safetensors" in capsys.readouterr().err
    half = edited(tmp_path, "memory_fastmin", lambda tensors, _: tensors.update(x=tensors["x"].half()))
    assert replay.main([str(half)]) == 2
    assert "tensor 'x' is float16 but traces are float32" in capsys.readouterr().err
    missing = edited(tmp_path, "dit_sf", lambda tensors, _: tensors.pop("in.noise"))
    assert replay.main([str(missing)]) == 2
    assert "in.noise" in capsys.readouterr().err
    shapeless = edited(tmp_path, "dit_sf", lambda tensors, _: tensors.update({"model.head.head.bias": torch.zeros(3)}))
    assert replay.main([str(shapeless)]) == 2
    assert "head.head.bias" in capsys.readouterr().err


def test_an_implementation_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, says in (
        (["--impl", "cuda"], "implementation 'cuda' needs a GPU"),
        (["--device", "cuda"], "--device cuda needs a GPU"),
        (["--impl", "sdpa", "--device", "cpu"], "'sdpa' does not run on the CPU"),
    ):
        assert replay.main([str(TRACES[0]), *words]) == 2
        assert says in capsys.readouterr().err


def test_triton_without_its_interpreter_is_an_error(monkeypatch, capsys):
    pytest.importorskip("triton", reason="pip install triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert replay.main([str(TRACES[0]), "--impl", "triton"]) == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "dtype"), [("dit_cf_roll", torch.float32), ("dit_longlive", torch.float16)])
def test_triton_replays_a_trace_in_its_interpreter(stem, dtype):
    pytest.importorskip("triton", reason="pip install triton")
    where = replay.replay_device("triton")
    report = replay.replay(DATA / f"{stem}.safetensors", ops.select("cuda", prefer="triton"), where, dtype)
    assert not report.mismatches, report.mismatches[:5]
    assert report.worst[0] <= replay.TOLERANCE[dtype], report.worst
