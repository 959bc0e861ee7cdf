"""Which plans an engine gets: built from files as they were written, named by all they are made of, never stale."""

import dataclasses
import json
import shutil
import sys
import types
import warnings
from functools import partial
from importlib.machinery import ModuleSpec

import pytest
import torch

from cfengine.bench.synthetic import SIZES, random_weights
from cfengine.config import PRECISIONS, product_names
from cfengine.errors import ConfigError, ExportError
from cfengine.export import build as builder
from cfengine.export import tensorrt_backend
from cfengine.export.build import build
from cfengine.export.calibrate import Calibration, calibrate
from cfengine.export.folder import export
from cfengine.export.tensorrt import Plan, _target
from cfengine.export.tensorrt_backend import _key, chosen, open_fastest, plans_for
from cfengine.export.tensorrt_layers import Contents
from cfengine.model.dit import CausalDiT
from cfengine.ops import select
from cfengine.segments.exported import SEGMENTS
from cfengine.segments.manifest import Manifest
from cfengine.segments.tensorrt_plans import NAME, Plans

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.cpu

TOY = SIZES["toy"]
FP8 = dataclasses.replace(TOY, precision=PRECISIONS["fp8"])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU with TensorRT that is not there: it builds plans of a few bytes.  built: what it was asked to"""
    made = types.SimpleNamespace(name="GPU A", built=[])
    for name in ("tensorrt", "tensorrt_rtx"):
        library = types.ModuleType(name)
        library.__version__, library.__spec__ = "11.0", ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, library)
    for module in (builder, tensorrt_backend):
        monkeypatch.setattr(module, "gpu_library", lambda: ("tensorrt", "12.0"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: made.name)

    def build_plan(trt, graph, what, capability=None, *, cache=b""):
        made.built.append(what)
        return Plan(f"{what} {len(made.built)}".encode(), Contents((), 1, 1), 0.0, b"")

    monkeypatch.setattr(builder, "build_plan", build_plan)
    monkeypatch.setattr(tensorrt_backend, "calibrate", partial(calibrate, prompts=["a"], chunks=1))
    monkeypatch.setenv("CFENGINE_CACHE_DIR", str(tmp_path / "cache"))
    return made


@pytest.fixture(scope="module")
def model():
    made = CausalDiT(TOY.model)
    made.load_state_dict(random_weights(TOY.model))
    return made.to(torch.bfloat16).prepare()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "toy"
    return export(TOY, model, folder, precision="bf16", graphs=SEGMENTS).folder


@pytest.fixture
def folder(exported, tmp_path):
    """An export in bf16, to build into and to damage."""
    return shutil.copytree(exported, tmp_path / "toy")


def encode(prompt):
    return torch.randn(4, TOY.model.text_dim, generator=torch.Generator().manual_seed(3))


def scales(folder) -> Calibration:
    manifest = Manifest.load(folder)
    return Calibration(manifest.model_hash, "made up", dict.fromkeys(product_names(manifest.layers), 4.0))


# First use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "precision"), [(TOY, "bf16"), (FP8, "fp8")])
def test_a_cold_cache_is_filled_and_a_warm_one_is_read(gpu, model, config, precision):
    manifest, plans = plans_for(config, model, encode)
    assert (plans.precision, plans.target, manifest.precision) == (precision, "current", "bf16")
    assert len(gpu.built) == TOY.model.layers + 1
    assert plans_for(config, model, encode)[1] == plans and len(gpu.built) == TOY.model.layers + 1


def test_cached_plans_of_another_library_are_built_anew(gpu, model, monkeypatch):
    _, old = plans_for(TOY, model, encode)
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "12.0")
    _, new = plans_for(TOY, model, encode)
    assert (old.library_version, new.library_version) == ("11.0", "12.0")
    assert len(gpu.built) == 2 * (TOY.model.layers + 1)


# Folders that someone built -------------------------------------------------------------------------------------------


def test_a_folder_with_one_precision_runs_that(gpu, model, folder):
    for capability, target in (("12.0", "rtx"), (None, "current")):
        options = {"capabilities": [capability]} if capability else {}
        build(folder, target=target, precision="nvfp4", calibration=scales(folder), **options)
        gpu.built.clear()
        _, plans = plans_for(TOY, model, encode, folder)
        assert (plans.precision, plans.target) == ("nvfp4", target) and not gpu.built


def test_a_folder_with_several_runs_the_one_that_is_configured(gpu, model, folder):
    for precision in ("fp8", "nvfp4"):
        build(folder, target="current", precision=precision, calibration=scales(folder))
    gpu.built.clear()
    with pytest.raises(ConfigError, match="has plans in fp8, nvfp4 for this GPU and none in bf16; .*--precision bf16"):
        plans_for(TOY, model, encode, folder)
    assert plans_for(FP8, model, encode, folder)[1].precision == "fp8"
    build(folder, target="current")
    assert plans_for(TOY, model, encode, folder)[1].precision == "bf16"


def test_fp8_is_not_run_unrounded(gpu, model, folder):
    build(folder, target="current")
    assert chosen(Manifest.load(folder), "fp8") is None
    assert plans_for(FP8, model, encode, folder)[1].precision == "fp8"


def test_half_a_set_of_plans_is_none(gpu, model, folder):
    build(folder, target="rtx", graphs=["first"])
    assert plans_for(TOY, model, encode, folder)[1].target == "current"


@pytest.mark.parametrize("which", ["first.onnx", "middle.safetensors"])
def test_plans_of_other_graphs_or_weights_are_refused(gpu, model, folder, edit_manifest, which):
    (plans,) = build(folder, target="current")
    edit_manifest(folder, lambda about: about["files"][which].update(sha256="0" * 64))
    with pytest.raises(ExportError, match=rf"plan was built from a {which} of hash \w+ and .* has 000000000000; run"):
        plans.check(Manifest.load(folder))


# Builds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["first.onnx", "middle.safetensors"])
def test_files_that_were_changed_are_not_built_from(gpu, folder, which):
    data = bytearray((folder / which).read_bytes())
    data[-1] ^= 1
    (folder / which).write_bytes(data)
    with pytest.raises(ExportError, match=f"{which} has hash .* and manifest.json says .* run cfengine export onnx"):
        build(folder)


def test_builds_add_up(gpu, folder):
    build(folder, capabilities=["8.6"], graphs=["first"])
    build(folder, capabilities=["8.9"])
    (whole,) = build(folder, capabilities=["8.6"], graphs=["middle", "last"])
    assert set(whole.files) == set(Plans.load(whole.folder, "8.9").files)
    build(folder, precision="fp8", calibration=scales(folder))
    assert json.loads((folder / "tensorrt" / "rtx-fp8" / NAME).read_text())["skipped"].keys() == {"8.6"}


def test_plans_of_other_scales_are_not_told_of_any_more(gpu, folder):
    build(folder, precision="fp8", calibration=scales(folder), capabilities=["8.9"])
    other = dataclasses.replace(scales(folder), largest=dict.fromkeys(scales(folder).largest, 2.0))
    (plans,) = build(folder, precision="fp8", calibration=other, capabilities=["12.0"])
    with pytest.raises(ExportError, match="has plans for compute capability 12.0 and this GPU has 8.9"):
        Plans.load(plans.folder, "8.9")


def test_two_gpus_of_one_capability_do_not_share_plans(gpu, model, folder):
    (first,) = build(folder, target="current")
    gpu.name = "GPU B, of 2 fans"
    assert chosen(Manifest.load(folder), "bf16") is None
    (second,) = build(folder, target="current")
    assert first.folder != second.folder and "current-bf16-GPU_B_of_2_fans" in str(second.folder)
    assert plans_for(TOY, model, encode, folder)[1] == second
    (second.folder / NAME).write_text("{")
    with pytest.raises(ExportError, match="--target current --precision bf16$"):
        Plans.load(second.folder, "12.0")
    gpu.name = "GPU A"
    assert first.file("first", 0).read("")


def test_a_graph_that_is_not_there_is_not_built_in_silence(gpu, folder):
    with pytest.raises(ExportError, match="has no graph 'encoder'"):
        build(folder, graphs=["encoder"])


def test_timings_of_another_gpu_are_left():
    class Config:
        def create_timing_cache(self, data):
            return data

        def set_timing_cache(self, cache, ignore_mismatch):
            self.taken = cache
            return ignore_mismatch or cache != b"of another"

    config = Config()
    assert _target(types.SimpleNamespace(), config, None, b"of this") == config.taken == b"of this"
    assert _target(types.SimpleNamespace(), config, None, b"of another") == config.taken == b""


# The choice -----------------------------------------------------------------------------------------------------------


def test_a_choice_is_of_kernels_versions_and_plans(gpu, model, folder, monkeypatch):
    ops = select("cpu")
    other = dataclasses.replace(ops, names=dict(ops.names) | {"gated_residual": "another"})
    keys = [_key(TOY, model, ops, None), _key(TOY, model, other, None), _key(TOY, model, ops, folder)]
    build(folder, target="current")
    keys.append(_key(TOY, model, ops, folder))
    monkeypatch.setattr(tensorrt_backend.importlib.metadata, "version", lambda name: "99")
    keys.append(_key(TOY, model, ops, None))
    assert len(set(keys)) == len(keys)


def test_auto_says_that_it_has_no_choice(monkeypatch):
    monkeypatch.setattr(tensorrt_backend, "installed", lambda: [])
    on_gpu = types.SimpleNamespace(weight=torch.empty(0, device="meta"))
    on_gpu.weight = types.SimpleNamespace(device=torch.device("cuda"))
    model = types.SimpleNamespace(patch_embedding=on_gpu, prepare=lambda precision: None)
    with pytest.warns(UserWarning, match="has torch alone to choose, without TensorRT; pip install"):
        assert open_fastest(TOY, model, None, encode) is None
    on_gpu.weight.device = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_fastest(TOY, model, None, encode) is None


def test_operands_are_there_before_another_stream_reads_them(monkeypatch):
    """As `torch.cuda` is called: no GPU is needed to see the order."""
    calls = []

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            calls.append(f"wait for {other}")

        def synchronize(self):
            pass

    class Ignored:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def replay(self):
            pass

    for name, stand_in in (("Stream", Stream), ("stream", Ignored), ("graph", Ignored), ("CUDAGraph", Ignored)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current one")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(tensorrt_backend, "one_pass", lambda *parts: lambda: calls.append("run"))
    weight = types.SimpleNamespace(device=torch.device("cuda"))
    model = types.SimpleNamespace(patch_embedding=types.SimpleNamespace(weight=weight))
    tensorrt_backend.pass_seconds(None, TOY, model, rounds=1)
    assert calls == ["wait for the current one", "run", "run"]
