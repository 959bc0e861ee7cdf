"""Real TensorRT-RTX engines of the shipped model, built without a GPU and examined layer by layer."""

import dataclasses
import json

import pytest
import torch

from cfengine.bench.synthetic import SIZES, random_weights
from cfengine.config import PRODUCTS, TINY_MODEL, product_names
from cfengine.engine import Engine
from cfengine.errors import ConfigError, ExportError
from cfengine.export.build import build, unserved
from cfengine.export.calibrate import Calibration, calibrate, watched
from cfengine.export.folder import export
from cfengine.model.dit import CausalDiT
from cfengine.segments.manifest import Manifest
from cfengine.segments.tensorrt_plans import NAME, Plans

pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.cpu, pytest.mark.trt]

SEGMENTS = ("first", "middle", "last")
POST = ["self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"]
WEIGHTS = {
    "first": ["pre.self_attn.qkv.weight"],
    "middle": [*(f"post.{name}.weight" for name in POST), "pre.self_attn.qkv.weight"],
    "last": [f"post.{name}.weight" for name in POST],
}


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny-world") as made:
        yield made


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "tiny"
    export(engine.config, engine.model, path, precision="bf16", graphs=SEGMENTS)
    return path


def made_up(manifest: Manifest) -> Calibration:
    return Calibration(manifest.model_hash, "made up", dict.fromkeys(product_names(manifest.layers), 4.0))


@pytest.mark.parametrize(("precision", "capability"), [("bf16", "8.6"), ("fp8", "8.9"), ("nvfp4", "12.0")])
def test_engines_compute_in_the_precision_that_was_asked_for(rtx, folder, precision, capability):
    manifest = Manifest.load(folder)
    (plans,) = build(folder, precision=precision, capabilities=[capability], calibration=made_up(manifest))
    assert set(plans.files) == {("first", 0), ("last", 0), *(("middle", i) for i in range(TINY_MODEL.layers - 1))}
    for (graph, _), file in plans.files.items():
        assert {name: file.products[name] for name in WEIGHTS[graph]} == dict.fromkeys(WEIGHTS[graph], precision)
        assert file.path.stat().st_size == file.bytes > file.weight_bytes
    dim, ffn = TINY_MODEL.dim, TINY_MODEL.ffn_dim
    weights = dim * (6 * dim + 2 * ffn)  # of a middle segment
    bits = {"bf16": 16, "fp8": 8, "nvfp4": 4.5}[precision]  # nvfp4: and 8 for every 16
    # biases, norms, scales and what aligns them to 128 bytes are at most 3 % of the weights in bf16
    assert 0 <= plans.file("middle", 0).weight_bytes - weights * bits / 8 < 0.03 * weights * 2
    assert json.loads((plans.folder / NAME).read_text())["calibration"] == "made up"


def test_equal_graphs_hold_their_own_weights_and_are_kept(rtx, folder):
    plans, *_ = build(folder, capabilities=["8.6"])
    hashes = [file.sha256 for file in plans.files.values()]
    assert len(set(hashes)) == len(hashes)
    times = {name: file.path.stat().st_mtime_ns for name, file in plans.files.items()}
    (again,) = build(folder, capabilities=["8.6"])
    assert {name: file.path.stat().st_mtime_ns for name, file in again.files.items()} == times


def test_targets_that_cannot_serve_a_precision_are_left_out_by_name(rtx, folder):
    found = build(folder, precision="nvfp4", calibration=made_up(Manifest.load(folder)), graphs=["first"])
    assert [plans.capability for plans in found] == ["12.0"]
    assert json.loads((found[0].folder / NAME).read_text())["skipped"] == {
        "8.6": "nvfp4 needs compute capability 12.0 or later",
        "8.9": "nvfp4 needs compute capability 12.0 or later",
    }
    with pytest.raises(ExportError, match=r"which was left out: nvfp4 needs compute capability 12\.0"):
        Plans.load(found[0].folder, "8.9")


def test_what_tensorrt_does_not_take_is_an_error_with_its_words(rtx):
    from onnx import TensorProto, helper

    from cfengine.export.tensorrt import build_plan

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    node = helper.make_node("Nonsense", ["x"], ["y"], "it")
    graph = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))
    with pytest.raises(ExportError, match="thing does not parse in tensorrt_rtx .*Nonsense"):
        build_plan(rtx, graph.SerializeToString(), "thing", "8.9")


@pytest.mark.slow
def test_a_block_of_full_size(rtx, tmp_path):
    """Two layers of the released size: one middle segment of 4,680 tokens, in bf16 and in fp8."""
    config = dataclasses.replace(SIZES["full"], model=dataclasses.replace(SIZES["full"].model, layers=2))
    model = CausalDiT(config.model)
    model.load_state_dict(random_weights(config.model))
    export(config, model.prepare(), tmp_path / "full", precision="bf16", graphs=("middle",))
    manifest = Manifest.load(tmp_path / "full")
    dim, ffn = config.model.dim, config.model.ffn_dim
    weights = dim * (6 * dim + 2 * ffn)
    for precision, size in (("bf16", 2), ("fp8", 1)):
        options = {"precision": precision, "calibration": made_up(manifest)}
        (plans,) = build(manifest.folder, capabilities=["8.9"], **options)
        file = plans.file("middle", 0)
        assert set(file.products.values()) == {precision}
        assert weights * size <= file.weight_bytes < 1.01 * weights * size
        assert file.workspace_bytes < 1 << 30


# The command ----------------------------------------------------------------------------------------------------------


def command(*words):
    """(exit code, standard output, standard error) of cfengine export tensorrt."""
    from typer.testing import CliRunner

    from cfengine.cli import app

    done = CliRunner().invoke(app, ["export", "tensorrt", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_says_what_it_built_and_left_out(rtx, folder):
    made_up(Manifest.load(folder)).save(folder)  # or it would stream first
    code, said, told = command(folder, "--precision", "fp8")
    assert code == 0, told
    assert "sm89: 7 plans in fp8 for compute capability 8.9" in said
    assert "sm120: 7 plans" in said and "left out 8.6: fp8 needs compute capability 8.9 or later" in said
    assert f"tensorrt_rtx {rtx.__version__}" in said
    assert "13/14 last for 12.0" in told


def test_the_command_refuses_before_it_calibrates(rtx, folder):
    code, _, told = command(folder, "--precision", "int8")
    assert code == 2 and "unknown precision 'int8'" in told
    code, _, told = command(folder / "nothing")
    assert code == 1 and "cfengine export onnx" in told


@pytest.mark.slow
def test_the_command_calibrates_with_the_model_that_was_exported(rtx, engine, tmp_path):
    export(engine.config, engine.model, tmp_path / "tiny", precision="bf16", graphs=("first",))
    code, _, told = command(tmp_path / "tiny", "--precision", "nvfp4")
    assert code == 0, told
    found = Calibration.load(tmp_path / "tiny", Manifest.load(tmp_path / "tiny").model_hash)
    assert list(found.largest) == product_names(TINY_MODEL.layers)
    assert found.made_from == "4 chunks of each of 4 prompts"


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "int8"),
        ({"target": "amd"}, "amd"),
        ({"precision": "fp16"}, "is in bf16 .* --precision fp16"),
        ({"precision": "fp8"}, "needs a calibration"),
        ({"precision": "fp8", "calibration": Calibration("0" * 64, "", {})}, "of weights 000000000000"),
    ],
)
def test_builds_that_cannot_be_are_refused(folder, options, words):
    with pytest.raises(ConfigError, match=words):
        build(folder, **options)


def test_without_a_gpu_there_is_no_current_one(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU to build for; use --target rtx"):
        build(folder, target="current")


def test_which_gpus_serve_which_precision():
    known = ("8.0", "8.6", "8.9", "9.0", "12.0")
    served = {p: [c for c in known if not unserved(p, c)] for p in ("bf16", "fp8", "nvfp4")}
    assert served == {"bf16": ["8.0", "8.6", "8.9", "9.0", "12.0"], "fp8": ["8.9", "9.0", "12.0"], "nvfp4": ["12.0"]}


# Calibration ----------------------------------------------------------------------------------------------------------


def test_a_calibration_sees_every_product_of_every_block(engine, tmp_path):
    found = calibrate(engine.config, engine.model, engine.text.encode, "a", prompts=["hold, snow, night"], chunks=2)
    assert list(found.largest) == product_names(TINY_MODEL.layers)
    assert all(0 < value < 1000 for value in found.largest.values())
    found.save(tmp_path)
    assert Calibration.load(tmp_path, "a") == found
    assert Calibration.load(tmp_path, "b") is None
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(ExportError, match="damaged"):
        Calibration.load(tmp_path, "a")


def test_watching_ends_and_leaves_the_model_as_it_was(engine):
    ops = engine.ops
    with watched(engine.model) as largest:
        rows = torch.linspace(-3, 2, engine.config.model.dim).repeat(2, 1)
        watching = [engine.model.blocks[1].project(ops, name, rows) for name in PRODUCTS[:2]]
        engine.model.blocks[1].project(ops, "ffn.2", torch.full((2, engine.config.model.ffn_dim), 2.0), gelu=True)
    assert largest["blocks.1.self_attn.qkv"] == largest["blocks.1.self_attn.o"] == 3.0
    assert largest["blocks.1.ffn.2"] == pytest.approx(1.9546, abs=1e-3)  # gelu(2)
    assert not any("project" in vars(block) for block in engine.model.blocks)
    for name, seen in zip(PRODUCTS, watching, strict=False):
        assert torch.equal(engine.model.blocks[1].project(ops, name, rows), seen)
