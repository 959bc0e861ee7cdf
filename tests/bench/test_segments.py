"""The bench of backends: what runs on a processor, with its errors; what does not, with the reason."""

import json

import pytest

from cfengine.bench import segments

pytestmark = pytest.mark.cpu


def run(tmp_path, *words):
    """Records of a run, by name."""
    path = tmp_path / "records.json"
    common = ["--device", "cpu", "--size", "toy", "--seconds", "0.02", "--json", str(path)]
    assert segments.main([*common, *words]) == 0
    return {entry["name"]: entry for entry in json.loads(path.read_text())}


def test_every_segment_and_the_chunk_of_each_backend(tmp_path):
    found = run(tmp_path, "--backends", "torch,eager,tensorrt")
    for part in ("first", "middle", "last", "chunk"):
        eager, torch = found[f"segments_{part}_eager"], found[f"segments_{part}_torch"]
        assert eager["config"]["relative_error"] == 0 and eager["ratio"] is None  # it is the reference
        assert torch["config"]["relative_error"] < 1e-4  # float32 sums in another order, through 4 passes
        assert torch["ratio"] == pytest.approx(eager["value"] / torch["value"])
        assert torch["baseline"] == "eager"
    refused = found["segments_tensorrt"]
    assert refused["value"] is None and "runs on a GPU" in refused["config"]["reason"]


@pytest.mark.slow
def test_exported_and_compiled_segments_agree(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = run(tmp_path, "--backends", "eager,onnxruntime,compile")
    for backend in ("onnxruntime", "compile"):
        for part in ("first", "middle", "last", "chunk"):
            assert found[f"segments_{part}_{backend}"]["config"]["relative_error"] < 1e-4  # float32, see above


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--backends", "openvino"], "openvino"), (["--seconds", "0"], "above 0"), (["--layers", "0"], "layers is 0")],
)
def test_mistakes_are_named(capsys, words, said):
    assert segments.main(["--device", "cpu", "--size", "toy", *words]) == 1
    assert said in capsys.readouterr().err
