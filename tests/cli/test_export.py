"""`cfengine export`: a folder from the default model, its check, and mistakes as sentences."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cfengine import cli_display, cli_generate
from cfengine.cli import app

pytestmark = pytest.mark.cpu


def call(*words: object):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_the_default_model_is_exported_and_checked(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "tiny"
    made = call("onnx", "--out", folder)
    assert made.exit_code == 0 and "7 graphs of 6 layers in fp32" in made.output, made.output
    checked = call("check", folder)
    assert checked.exit_code == 0 and "within tolerance" in checked.output, checked.output


@pytest.mark.parametrize(
    ("words", "code", "said"),  # 2: a mistake in what was asked, 1: a folder that cannot be used
    [
        (("onnx", "--out", "{folder}/x", "--precision", "int4"), 2, "precision 'int4'"),
        (("onnx", "--out", "{folder}/x", "--sessions", "none"), 2, "sessions is 'none'"),
        (("onnx", "--out", "{folder}/x", "--model", "nothing"), 2, "unknown model 'nothing'"),
        (("check", "{folder}"), 1, "has no manifest.json"),
        (("tensorrt", "{folder}"), 1, "has no manifest.json"),
    ],
)
def test_mistakes(tmp_path, words, code, said) -> None:
    result = call(*(word.format(folder=tmp_path) for word in words))
    assert result.exit_code == code
    assert said in " ".join(result.output.split()) and "Traceback" not in result.output
    assert not (tmp_path / "x").exists()


# `cfengine generate` with an export -----------------------------------------------------------------------------------


def test_a_first_use_is_shown_and_the_next_one_reads_the_cache(tmp_path, monkeypatch) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("CFENGINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cli_display, "INTERVAL", 0.0)  # every step, however fast
    words = ["generate", "hold, meadow", "--frames", "1", "--backend", "onnxruntime", "--no-provenance"]
    for told in (True, False):
        made = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "a.mp4")])
        assert made.exit_code == 0, made.output
        assert ("0/4 first" in made.stderr and "4/4 done" in made.stderr) == told


def test_a_terminal_shows_first_use_as_a_bar() -> None:
    show = cli_display.LiveDisplay()
    show.loading("tiny-world")
    show.preparing("middle.03 for 8.9", 3, 7)
    (task,) = show._progress.tasks
    show.close()
    assert (task.description, task.completed, task.total) == ("middle.03 for 8.9", 3, 7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--backend", "onnx"), "unknown backend 'onnx'"),
        (("--backend", "tensorrt"), "backend 'tensorrt' does not run on device 'cpu'; give --device cuda"),
        (("--backend", "onnxruntime", "--device", "cuda"), "does not run on device 'cuda'; give --device cpu"),
        (("--exported", "somewhere"), "backend 'torch' reads no export"),
    ],
)
def test_backends_that_cannot_be_are_said_before_the_model_loads(monkeypatch, words, said) -> None:
    monkeypatch.setattr(cli_generate, "load", lambda *_: pytest.fail("the model was loaded"))
    result = CliRunner().invoke(app, ["generate", "hills", *words])
    assert result.exit_code == 2 and said in " ".join(result.output.split())
