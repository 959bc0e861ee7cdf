"""The suite outlives parts that fail or hang, keeps its files few, and runs from a plain checkout."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

import pytest

from cfengine.bench import gpu_suite
from cfengine.bench.gpu_suite import Part
from cfengine.bench.records import record, write
from cfengine.errors import ConfigError

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
WRITES = """
import json, sys
record = dict(name="stream_fps_bf16", value=1.0, unit="frames/s", baseline=None, ratio=None, config=None, commit="a")
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps([record]))
print("wrote")
"""
# ignores the request to end, and has a child that would outlive it
HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "CALM", 0.5)
    parts = [
        Part("breaks", python("import sys; print('so it is'); sys.exit(3)"), 60, records=False),
        Part("hangs", python(HANGS), 2, records=False),
        Part("works", python(WRITES), 60),
        Part("lies", python("print('ends well, writes nothing')"), 60),
    ]
    said = []
    outcomes = gpu_suite.run(parts, tmp_path, 5, "abc", said.append)
    assert [(o.status, o.code) for o in outcomes] == [("failed", 3), ("timeout", None), ("ok", 0), ("ok", 0)]
    assert outcomes[0].last == "so it is"
    assert 2 <= outcomes[1].seconds < 30
    child = int(outcomes[1].last)
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(["log.txt", gpu_suite.results_name()]) and len(files) <= gpu_suite.MOST_FILES
    records = {entry["name"]: entry for entry in json.loads((tmp_path / gpu_suite.results_name()).read_text())}
    assert records["stream_fps_bf16"]["value"] == 1.0
    assert {entry["commit"] for entry in records.values()} == {"abc"}
    assert records["suite_breaks"]["config"] == {"status": "failed", "exit_code": 3, "last_line": "so it is"}
    assert records["suite_hangs"]["config"]["status"] == "timeout"
    log = (tmp_path / "log.txt").read_text()
    assert "===== hangs, at most 2 s" in log and "wrote" in log
    assert said[-1].startswith("\n2 ok, 1 failed, 1 timeout (breaks failed, hangs timeout)")
    assert any("stream_fps_bf16" in text for text in said)


def test_no_part_begins_without_time(tmp_path):
    parts = [Part("late", python("print('ran')"), 60, records=False)]
    (outcome,) = gpu_suite.run(parts, tmp_path, 0.0, None, lambda text: None)
    assert outcome.status == "skipped" and "0 s were left" in outcome.last
    assert "ran" not in (tmp_path / "log.txt").read_text()


def test_the_list_names_every_part_in_order(capsys):
    assert gpu_suite.main(["--list"]) == 0
    names = [text.split()[0] for text in capsys.readouterr().out.splitlines()]
    first = ["build", "tests", "attention", "stream_bf16", "stream_fp8", "baseline", "roofline"]
    assert names[: len(first)] == first and "policies" in names and len(names) == len(set(names))


def test_what_matters_most_fits_into_nine_minutes():
    parts = {part.name: part.budget for part in gpu_suite.parts(30)}
    wanted = ("build", "tests", "attention", "stream_bf16", "stream_fp8", "baseline")
    assert sum(parts[name] for name in wanted) <= 60 * gpu_suite.MINUTES


def test_every_command_is_understood(monkeypatch, capsys):
    """Benches take the words that the suite gives them; --help comes after them and ends the run."""
    for part in gpu_suite.parts(30):
        if part.records:
            words = [*part.command[3:], "--json", "x.json", *(["--plot", part.plot] if part.plot else []), "--help"]
            monkeypatch.setattr(sys, "argv", ["bench", *words])
            with pytest.raises(SystemExit) as end:
                runpy.run_module(part.command[2], run_name="__main__")
            assert end.value.code == 0, part.name
            assert "--json" in capsys.readouterr().out


def test_gpu_tests_are_found_kernels_first():
    files = gpu_suite.gpu_tests()
    assert "tests/kernels/test_triton.py" in files
    kernels = [file.startswith("tests/kernels/") for file in files]
    assert kernels == sorted(kernels, reverse=True)
    assert Path(__file__).relative_to(ROOT).as_posix() not in files


def test_only_some_parts(capsys):
    assert [part.name for part in gpu_suite.choose(gpu_suite.parts(1), "baseline,build")] == ["build", "baseline"]
    with pytest.raises(ConfigError, match="unknown part 'everything'"):
        gpu_suite.choose(gpu_suite.parts(1), "everything")


def test_a_folder_that_holds_much_is_refused(tmp_path):
    gpu_suite.prepare(tmp_path / "new")
    for i in range(gpu_suite.MOST_FILES - 2):
        (tmp_path / f"{i}").write_text("")
    with pytest.raises(ConfigError, match="at most 8"):
        gpu_suite.prepare(tmp_path)


@pytest.mark.parametrize(
    ("name", "slug"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 4090", "rtx")]
)
def test_results_are_named_after_the_gpu(monkeypatch, name, slug):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "device_name", lambda: name)
    assert gpu_suite.results_name().split("-")[0].startswith(slug)


def test_records_that_were_cut_off_are_left_out(tmp_path):
    (tmp_path / "half.json").write_text('[{"name": ')
    assert gpu_suite.load(tmp_path / "half.json") == gpu_suite.load(tmp_path / "none.json") == []
    write(tmp_path / "r.json", [record("a", 1, "s")])
    assert gpu_suite.load(tmp_path / "r.json")[0]["name"] == "a"
