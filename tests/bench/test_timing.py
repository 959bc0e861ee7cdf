"""Timing, records and command lines that the benches share."""

from __future__ import annotations

import json
import time

import pytest
import torch

from cfengine.bench import command, plots
from cfengine.bench.ceilings import copy_bandwidth, gemm_rate
from cfengine.bench.records import line, record, write
from cfengine.bench.settings import Setting, resolution
from cfengine.bench.timing import clocked, measure, percentile, sets
from cfengine.errors import ConfigError

pytestmark = pytest.mark.cpu


def test_measure_uses_every_input_and_takes_medians():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    times = measure(calls, "cpu", seconds=0.001)
    assert set(seen) == {0, 1, 2}
    assert times.how == "clock" and times.count >= 2
    assert 0 <= times.low <= times.median <= times.high


def test_slow_calls_are_timed_a_few_times():
    calls = 0

    def slow():
        nonlocal calls
        calls += 1
        time.sleep(0.03)

    times = measure([slow], "cpu", seconds=0.01)
    assert times.median >= 0.03 and calls == 3  # one to warm up, two timed


def test_clocked_is_wall_clock():
    assert clocked(lambda: time.sleep(0.02), "cpu") >= 0.02


def test_percentiles():
    values = list(range(1, 101))
    assert [percentile(values, q) for q in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.5) == 7.0


def test_two_sets_of_inputs_on_a_processor():
    assert sets(10**9, "cpu") == 2


def test_ceilings_are_rates():
    assert copy_bandwidth("cpu", 0.01) > 1e6
    assert gemm_rate("bf16", "cpu", 0.01) > 1e6


def test_lines_show_ratio_and_missing_values():
    assert line(record("a", 1.5, "ms", "b", 2.0)).endswith("1.5 ms   2 x b")
    assert line(record("a", None, "us")).endswith("- us")


def test_records_name_the_software(tmp_path):
    write(tmp_path / "r.json", [record("a", 1.0, "s")])
    (entry,) = json.loads((tmp_path / "r.json").read_text())
    assert entry["software"]["torch"] == torch.__version__ and "driver" in entry["software"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--device", "cuda"], "no CUDA device"), (["--device", "tpu"], "unknown device 'tpu'")],
)
def test_a_device_that_is_not_there(words, message, capsys):
    if torch.cuda.is_available() and "cuda" in words:
        pytest.skip("there is a CUDA device")
    options = command.parser("x", "").parse_args(words)
    assert command.run(options, lambda options, say: []) == 1
    assert message in capsys.readouterr().err


def test_size_follows_the_device():
    options = command.parser("x", "").parse_args(["--device", "cpu"])
    command.settle(options)
    assert options.size == "toy"


def test_a_settings_name_says_what_is_not_usual():
    assert Setting("slow_fast", "bf16").suffix == "bf16"
    assert Setting("fifo", "fp8", "wan_vae", 2, "toy", (416, 240)).suffix == "fp8_fifo_wan_vae_416x240_2_sessions_toy"


@pytest.mark.parametrize("text", ["832", "832x", "ax480", "x"])
def test_resolutions_that_are_none(text):
    with pytest.raises(ConfigError, match="832x480"):
        resolution(text)


def test_a_plot_without_matplotlib_is_a_sentence(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plots.stacked(tmp_path / "a.png", {"bf16": {"linear": 1.0}}, "")


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    plots.stacked(tmp_path / "a.png", {"floor": {"linear": 1.0, "rest": -1.0}, "measured": {"linear": 2.0}}, "title")
    shape = {"share_of_ceiling": 0.5, "implementation": "triton"}
    plots.shares(tmp_path / "b.png", [record("kernel_norm_bf16_triton", 1.0, "us", config=shape), record("c", 1, "s")])
    assert (tmp_path / "a.png").stat().st_size > 1000 and (tmp_path / "b.png").stat().st_size > 1000


def test_a_run_that_breaks_leaves_what_it_has(tmp_path, capsys):
    def work(options, say):
        yield [record("a", 1.0, "s")]
        raise ConfigError("it ends here")

    options = command.parser("x", "").parse_args(["--device", "cpu", "--json", str(tmp_path / "r.json")])
    assert command.run(options, work) == 1
    assert [entry["name"] for entry in json.loads((tmp_path / "r.json").read_text())] == ["a"]
    assert "it ends here" in capsys.readouterr().err
