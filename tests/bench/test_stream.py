"""The stream bench at toy size: it checks first, and says what its numbers hold."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cfengine.bench import check, stream
from cfengine.bench.settings import Setting
from cfengine.bench.synthetic import EngineRun
from cfengine.errors import CFEngineError

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(stream, "FIRST_FRAMES", 2)
    monkeypatch.setattr(stream, "LEAST_CHUNKS", 2)


def toy(precision: str = "fp32", policy: str = "slow_fast", **more) -> Setting:
    return Setting(policy, precision, size="toy", **more)


def test_two_precisions_in_one_run(tmp_path, capsys):
    path = tmp_path / "records.json"
    words = ["--device", "cpu", "--precision", "fp32,bf16", "--seconds", "0", "--check-chunks", "1"]
    assert stream.main([*words, "--flow-chunks", "2", "--json", str(path)]) == 0
    records = {entry["name"]: entry for entry in json.loads(path.read_text())}
    kinds = ("stream_fps", "stream_chunk_ms", "first_frame_seconds", "session_open_seconds", "peak_memory_gb")
    expected = {f"{kind}_{precision}_toy" for kind in kinds for precision in ("fp32", "bf16")}
    expected |= {"chunk_p99_over_p50_toy", "chunk_p99_over_p50_fp32_toy", "bf16_flow_error_toy"}
    assert set(records) == expected
    shape = records["stream_fps_fp32_toy"]["config"]
    assert shape["slots_in_context"] == shape["slots"] == 21
    assert shape["denoise_passes"] == 4 and shape["clean_passes"] == 1 and shape["decoder"] == "taehv"
    assert shape["p99_ms"] >= shape["p95_ms"] >= shape["p50_ms"] > 0
    assert 0 <= shape["check_error"] < check.LIMITS["fp32"]
    assert "decoder" in shape["includes"] and "clean pass" in shape["includes"]
    flow = records["bf16_flow_error_toy"]
    assert 1e-4 < flow["value"] < 0.05 and flow["baseline"] == "fp32, teacher-forced"
    assert len(flow["config"]["per_pass"]) == 2 and len(flow["config"]["per_pass"][0]) == 5
    shown = capsys.readouterr().out
    for words in ("21 of 21 slots", "4 denoise passes and the clean pass", "decoder taehv", "1 session)"):
        assert words in shown
    for text in shown.splitlines():  # no bare frames per second outside the table of records
        assert "frames/s" not in text or "slots in context" in text or text.startswith("stream_fps")


@pytest.mark.parametrize("policy", ["fifo", "relative_window"])
def test_other_rules_fill_the_memory_too(policy):
    seen = stream.stream(toy(policy=policy, sessions=2), "cpu", 0.0, 0)
    assert seen.slots == (21, 21) and seen.error is None
    assert seen.frames == 2 * 12 * len(seen.periods)
    assert seen.fps == pytest.approx(seen.frames / sum(seen.periods)) and seen.fps_each == pytest.approx(seen.fps / 2)
    assert f"2 sessions of {seen.fps_each:.2f} each)" in stream.sentence(toy(policy=policy, sessions=2), seen)
    name = stream.records(toy(policy=policy, sessions=2), seen)[0]["name"]
    assert name == f"stream_fps_fp32_{policy}_2_sessions_toy"


def test_sessions_of_a_batch_see_what_they_see_alone():
    with toy(sessions=2).engine("cpu") as engine, engine.batch(["a", "b"], seeds=[3, 4]) as batch:
        alone = [engine.session(prompt, seed=seed) for prompt, seed in (("a", 3), ("b", 4))]
        for _ in range(3):
            for frames, single in zip(batch.next_chunk(), alone, strict=True):
                expected = single.next_chunk()
                assert [frame.index for frame in frames] == [frame.index for frame in expected]
                # float32: products over more rows may sum in another order, which a rounding to a level may show
                assert all(
                    np.abs(one.pixels.astype(int) - two.pixels).max() <= 1
                    for one, two in zip(frames, expected, strict=True)
                )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "int4"], "unknown precision 'int4'"),
        (["--policy", "lru"], "unknown policy 'lru'"),
        (["--sessions", "0"], "--sessions is 0"),
        (["--resolution", "33"], "832x480"),
        (["--resolution", "33x32"], "width 33 is not a multiple"),
        (["--json", "gone/records.json"], "gone"),
    ],
)
def test_mistakes_are_sentences(words, message, capsys):
    assert stream.main(["--device", "cpu", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_wrong_operation_is_not_timed():
    with toy().engine("cpu") as engine:
        right = engine.ops.modulated_norm
        engine.ops = replace(engine.ops, modulated_norm=lambda *a, **k: 1.001 * right(*a, **k))
        with pytest.raises(CFEngineError, match="no speed is reported"):
            check.against_reference(engine, "fp32")


def test_tables_that_differ_are_named():
    with toy().engine("cpu") as engine:
        teacher, student = EngineRun.of(engine), EngineRun.of(engine)
        student.memory.policy.rule = student.memory.policy.rule._replace(threshold=-2.0)
        with pytest.raises(CFEngineError, match="sources of layer 0"):
            check.pass_errors(teacher, student, 3, forced=False)


def test_forced_runs_follow_the_teachers_tables():
    with toy().engine("cpu") as engine:
        teacher, student = EngineRun.of(engine), EngineRun.of(engine)
        student.memory.policy.rule = student.memory.policy.rule._replace(threshold=-2.0)
        errors = check.pass_errors(teacher, student, 3, forced=True)
    assert errors == [[0.0] * 5] * 3


def test_flows_that_are_not_numbers_never_pass():
    flow = torch.randn(4)
    assert check.relative(torch.full((4,), float("nan")), flow) == float("inf")
    assert check.relative(flow, flow) == 0
