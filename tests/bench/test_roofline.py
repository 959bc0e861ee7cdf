"""The roofline, the comparison with the baseline and the profile, each from end to end at toy size."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from cfengine.bench import build, profile, roofline, versus
from cfengine.bench.ceilings import Ceilings
from cfengine.bench.settings import Setting
from cfengine.errors import CFEngineError, ConfigError

pytestmark = pytest.mark.cpu

CEILINGS = Ceilings(bandwidth=1e10, gemm={"fp32": 1e11, "bf16": 1e11})


def test_roofline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device, seconds: CEILINGS)
    monkeypatch.setattr(roofline, "STREAMED", 2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    path = tmp_path / "records.json"
    words = ["--device", "cpu", "--precision", "fp32,fp8", "--seconds", "0", "--json", str(path)]
    assert roofline.main([*words, "--plot", str(tmp_path / "a.png")]) == 0
    records = {entry["name"]: entry for entry in json.loads(path.read_text())}
    for suffix in ("fp32_toy", "fp8_toy"):
        low, high = (records[f"roofline_{kind}_ms_{suffix}"] for kind in ("floor", "chunk"))
        assert tuple(low["config"]["floor_ms"]) == roofline.TERMS == tuple(high["config"]["measured_ms"])
        assert sum(low["config"]["floor_ms"].values()) == pytest.approx(low["value"])
        assert sum(high["config"]["measured_ms"].values()) == pytest.approx(high["value"])
        assert high["ratio"] == pytest.approx(high["value"] / low["value"])
        assert min(high["config"]["measured_ms"][term] for term in ("linear", "attention", "cross", "decode")) > 0
    shown = capsys.readouterr().out
    assert "pip install matplotlib" in shown and "gaps and rest" in shown and "total" in shown


def test_baseline_is_timed_in_turns(tmp_path):
    from cfengine.bench import baseline

    assert baseline.__doc__.startswith("The named baseline")
    path = tmp_path / "records.json"
    words = ["--device", "cpu", "--precision", "fp32,bf16", "--rounds", "1", "--json", str(path)]
    assert versus.main(words) == 0
    records = {entry["name"]: entry for entry in json.loads(path.read_text())}
    assert set(records) == {"engine_vs_baseline_fp32_toy", "engine_vs_baseline_bf16_toy"}
    exact = records["engine_vs_baseline_fp32_toy"]
    assert exact["baseline"] == "reference_method, torch SDPA, float32"
    assert exact["ratio"] == pytest.approx(exact["config"]["baseline_ms"] / exact["value"])
    assert max(exact["config"]["latents_rms"]) < 1e-4  # the same video, and memories that agree to the end
    assert 1e-4 < records["engine_vs_baseline_bf16_toy"]["config"]["latents_rms"][0] < versus.LIMITS["bf16"]


def test_another_video_is_not_compared():
    setting = Setting("slow_fast", "fp32", size="toy")
    with setting.engine("cpu") as engine, engine.session("anything", seed=1) as session:
        with pytest.raises(CFEngineError, match="no ratio is reported"):
            versus.fill(setting, session, versus.Rival(engine, "cpu"))


def test_profile_by_name(tmp_path, capsys):
    path = tmp_path / "records.json"
    assert profile.main(["--device", "cpu", "--precision", "fp32", "--json", str(path)]) == 0
    (entry,) = json.loads(path.read_text())
    assert entry["name"] == "profile_idle_share_fp32_toy" and 0 <= entry["value"] < 1
    assert any("conv" in name for name in entry["config"]["kernels"])
    assert "ms a chunk" in capsys.readouterr().out


def test_busy_time_counts_overlaps_once():
    spans = [("a", 0.0, 10.0), ("b", 5.0, 12.0), ("c", 6.0, 7.0), ("a", 20.0, 21.0)]
    assert profile.busy(spans) == 13
    assert profile.totals(spans, 1)["a"] == (0.011, 2)


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_nsight_commands(tool, capsys, monkeypatch):
    words = ["--device", "cpu", "--tool", tool, "--out", "here", "--kernel", "regex:norm", "--eager"]
    assert profile.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tool} ") and "--tool range" in said and "here" in said and "--eager" in said
    assert ("--capture-range=cudaProfilerApi" if tool == "nsys" else "--profile-from-start off") in said
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert profile.main(words) == 1
    assert f"{tool} was not found" in capsys.readouterr().err


def test_a_range_for_other_profilers():
    with Setting("slow_fast", "fp32", size="toy").engine("cpu") as engine:
        profile.marked(engine, 1)


def test_the_build_configures_this_python_in_place(monkeypatch, tmp_path):
    pybind11 = type(sys)("pybind11")
    pybind11.get_cmake_dir = lambda: "/somewhere/pybind11"
    monkeypatch.setitem(sys.modules, "pybind11", pybind11)
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/usr/bin/{name}")
    configure, make = build.commands(tmp_path)
    assert f"-DPython_EXECUTABLE={sys.executable}" in configure and "-Dpybind11_DIR=/somewhere/pybind11" in configure
    assert f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build.ROOT / 'cfengine'}" in configure and "Ninja" in configure
    assert make[:3] == ["/usr/bin/cmake", "--build", str(tmp_path)]
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="cmake was not found"):
        build.commands(tmp_path)


def test_the_build_is_needed_when_a_source_is_newer(monkeypatch, tmp_path):
    (tmp_path / "cfengine").mkdir()
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "bindings.cpp"
    source.write_text("")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.needed()
    build.target().write_text("")
    import os

    os.utime(source, (1, 1))
    assert not build.needed() and build.build() is None
    os.utime(source, (2**32, 2**32))
    assert build.needed()


def test_a_failed_build_is_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "commands", lambda folder: [[sys.executable, "-c", "import sys; sys.exit(1)"]])
    assert build.main([]) == 1
    assert "the build failed at" in capsys.readouterr().err


def test_floor_and_measured_share_their_terms():
    config = replace(Setting("slow_fast", "bf16", size="toy").config())
    assert tuple(roofline.floor(config, "bf16", CEILINGS)) == roofline.TERMS
