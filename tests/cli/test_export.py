"""`cfengine export`: a folder from the default model, its check, and mistakes as sentences."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

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
