"""Help, versions, presets, the doctor and the way to the benches."""

import re
import sys

import pytest

from cfengine import doctor
from cfengine.config import PRESETS

pytestmark = pytest.mark.cpu


def test_help_and_mistakes_import_nothing_heavy(python):
    code = """
import sys
from cfengine.cli import app
try:
    app(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "numpy", "av", "transformers", "diffusers", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    for arguments in (["--help"], ["--version"], ["models"], ["generate", "--help"], ["verify", "--help"]):
        done = python(code, *arguments)
        assert done.returncode == 0, done.stderr
    mistake = python(code.replace('"numpy", "av", ', ""), "generate", "hills", "--policy", "lru")
    assert mistake.returncode == 0, mistake.stderr


def test_version(run):
    assert re.fullmatch(r"cfengine \d+\.\d+\.\d+\S*\n", run("--version").stdout)


def test_models_lists_presets_with_their_sources(run):
    output = run("models").stdout
    for name, config in PRESETS.items():
        line = next(line for line in output.splitlines() if line.startswith(name))
        for part in (config.dit_source, config.base_source, config.memory.policy, f"{config.video.width}x"):
            assert part in line


def test_doctor_says_what_serves_each_operation(run):
    from cfengine import ops

    result = run("doctor")
    for op, candidates in ops.choices("cpu").items():
        serving = next(name for name, available, _ in candidates if available)
        assert re.search(rf"{op} on cpu +{serving}\b", result.stdout)
    assert "cfengine._C" in result.stdout
    assert result.exit_code == (1 if "missing" in result.stdout else 0)


def test_doctor_names_the_command_that_adds_a_package(monkeypatch):
    real = doctor.importlib.util.find_spec
    absent = {"diffusers", "av"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    found = {finding.name: finding for finding in doctor.packages()}
    assert (found["diffusers"].state, found["diffusers"].remedy) == ("note", "pip install -e '.[wan]'")
    assert (found["av"].state, found["av"].remedy) == ("missing", "pip install -e .")
    assert found["numpy"].state == "ok"
    assert not doctor.Report({"packages": list(found.values())}).healthy


def test_doctor_says_why_the_core_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "cfengine._C", None)
    monkeypatch.delattr("cfengine._C", raising=False)
    (finding,) = doctor.core()
    assert finding.state == "note" and "not built" in finding.text and "pip install -e ." in finding.remedy


def test_bench_passes_through(run, python):
    unknown = run("bench", "nope")
    assert unknown.exit_code == 2
    assert re.search(r"unknown benchmark 'nope'; known: .*\bcpu\b", unknown.stderr)
    done = python("from cfengine.cli import app; app()", "bench", "cpu", "--help")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout
