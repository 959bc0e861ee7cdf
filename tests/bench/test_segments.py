"""The bench of backends: what runs on a processor, with its errors; what does not, with the reason."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from cfengine.bench import segments
from cfengine.segments.tensorrt import Loaded
from cfengine.segments.torch import TorchSegments

pytestmark = pytest.mark.cpu


def run(tmp_path, *words):
    """Records of a run, by name."""
    path = tmp_path / "records.json"
    common = ["--device", "cpu", "--size", "toy", "--seconds", "0.02", "--json", str(path)]
    assert segments.main([*common, *words]) == 0
    return {entry["name"]: entry for entry in json.loads(path.read_text())}


def test_every_segment_and_the_chunk_of_each_backend(tmp_path):
    found = run(tmp_path, "--backends", "torch,eager,tensorrt,tensorrt_fp8")
    for part in ("first", "middle", "last", "chunk"):
        eager, ours = found[f"segments_{part}_eager"], found[f"segments_{part}_torch"]
        assert eager["config"]["relative_error"] == 0 and eager["ratio"] is None  # it is the reference
        assert ours["config"]["relative_error"] < 1e-4  # float32 sums in another order, through 4 passes
        assert ours["ratio"] == pytest.approx(eager["value"] / ours["value"])
        assert ours["baseline"] == "eager"
    for backend in ("tensorrt", "tensorrt_fp8"):
        refused = found[f"segments_{backend}"]
        assert refused["value"] is None and f"{backend!r} runs on a GPU" in refused["config"]["reason"]


def test_a_result_that_is_no_number_is_no_small_error():
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for got in ([good, bad], [bad, good]):
        assert math.isnan(segments.error(got, [good, good]))
    assert segments.error([good, good], [good, 2 * good]) == 0.5


def test_what_loading_took_is_recorded(monkeypatch, tmp_path):
    def opened(setup, backend):
        made = TorchSegments(setup.model, segments.plain_ops(setup.device), setup.config.grid)
        made.runner = SimpleNamespace(loaded=Loaded(3, 0.5, 10, 20, 30), plans=SimpleNamespace(precision="fp8"))
        return made

    monkeypatch.setattr(segments, "opened", opened)
    load = run(tmp_path, "--backends", "tensorrt_fp8")["segments_load_tensorrt_fp8"]
    assert (load["value"], load["unit"]) == (0.5, "s")
    told = {"plans": 3, "plan_bytes": 10, "weight_bytes": 20, "workspace_bytes": 30, "precision": "fp8"}
    assert told.items() <= load["config"].items()


def test_an_export_is_kept_where_that_is_asked_for(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = ["--backends", "onnxruntime", "--folder", str(tmp_path / "kept")]
    run(tmp_path, *words)
    written = (tmp_path / "kept" / "manifest.json").stat().st_mtime_ns
    found = run(tmp_path, *words)
    assert "segments_chunk_onnxruntime" in found
    assert (tmp_path / "kept" / "manifest.json").stat().st_mtime_ns == written
    refused = run(tmp_path, *words, "--layers", "3")["segments_onnxruntime"]
    assert refused["value"] is None and "was made from weights of hash" in refused["config"]["reason"]


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
