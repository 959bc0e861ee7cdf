"""Plans built and run by a stand-in for TensorRT (tensorrt_stand_in.py), so that all around its engines is real."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from cfengine.bench import segments as bench
from cfengine.bench.synthetic import SIZES as CONFIGS
from cfengine.bench.synthetic import random_weights
from cfengine.errors import DeviceError, ExportError
from cfengine.export.build import build
from cfengine.export.calibrate import calibrate
from cfengine.export.folder import export
from cfengine.export.tensorrt_backend import held
from cfengine.memory.memory import Memory
from cfengine.model.dit import CausalDiT
from cfengine.ops import select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.program import PromptBuffers
from cfengine.scheduler.sampler import Schedule, chunk_noise
from cfengine.segments import tensorrt, tensorrt_library
from cfengine.segments.binding import Binding
from cfengine.segments.exported import GraphSegments
from cfengine.segments.manifest import Graph, Manifest, Operand
from cfengine.segments.onnx import OnnxRunner
from cfengine.segments.tensorrt import TensorRTRunner
from cfengine.segments.tensorrt_plans import NAME, Plans
from cfengine.segments.torch import TorchSegments

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.cpu

TOY = CONFIGS["toy"]
spec = importlib.util.spec_from_file_location("tensorrt_stand_in", Path(__file__).with_name("tensorrt_stand_in.py"))
stand_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_in)


def toy(dtype=torch.float16):
    """A small model with random weights."""
    model = CausalDiT(TOY.model)
    model.load_state_dict(random_weights(TOY.model))
    return model.to(dtype).prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy model in float16, exported."""
    path = tmp_path_factory.mktemp("export") / "toy"
    export(TOY, toy(torch.float32), path, precision="fp16", graphs=("first", "middle", "last"))
    return path


@pytest.fixture
def library(monkeypatch):
    """The stand-in, found wherever the real one would be imported, on a GPU that it pretends to see."""
    made = stand_in.Library()
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    monkeypatch.setattr(tensorrt, "on_gpu", made.on_gpu)
    monkeypatch.setattr(tensorrt, "capturing", lambda device: made.capturing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Stand-in 90")
    return made


@pytest.fixture
def plans(folder, library):
    return build(folder, target="current", precision="fp16")[0]


def run_chunks(segments, model, chunks=2):
    """x0 of each of some chunks, as a stream computes them."""
    config = TOY
    scheduler = ChunkScheduler(model, segments, Schedule(config.sampler))
    memory = Memory(config, segments.ops, model.dtype, "cpu")
    prompt = PromptBuffers(config, model.dtype, torch.device("cpu"))
    with torch.inference_mode():
        rows = torch.randn(4, config.model.text_dim, generator=torch.Generator().manual_seed(3))
        prompt.load(model.project_text(rows))
    shape = config.model.in_channels, config.video.latent_height, config.video.latent_width
    made, frames = [], config.memory.chunk_frames
    for start in range(0, chunks * frames, frames):
        x0 = scheduler.denoise(
            memory, prompt.layers, start, lambda step, start=start: chunk_noise(0, start, frames, step, shape)
        )
        scheduler.clean_pass(memory, prompt.layers, start, x0)
        made.append(x0)
    return torch.cat(made)


def runner(folder, plans, library, **options):
    return TensorRTRunner(Manifest.load(folder), plans, "cpu", trt=library, stream=lambda: 77, **options)


def segments_of(folder, plans, library, ops=None):
    return GraphSegments(Manifest.load(folder), runner(folder, plans, library), ops or select("cpu"), plans.symbols)


def test_chunks_are_those_of_torch(folder, plans, library):
    ops = select("cpu", prefer="reference")
    model, half = toy(torch.float32), toy()
    segments = segments_of(folder, plans, library, ops)
    expected = run_chunks(TorchSegments(model, ops, TOY.grid), model)
    error = (run_chunks(segments, half) - expected).norm() / expected.norm()
    assert error < 0.02  # float16 keeps 11 bits; two chunks of five passes add their roundings up
    assert set(library.streams) == {77}


def test_fp8_plans_are_as_exact_as_their_calibration(folder, library):
    ops, manifest, wide = select("cpu", prefer="reference"), Manifest.load(folder), toy(torch.float32)
    expected = run_chunks(TorchSegments(wide, ops, TOY.grid), wide)
    rows = torch.randn(4, TOY.model.text_dim, generator=torch.Generator().manual_seed(3))
    found = calibrate(TOY, wide, lambda prompt: rows, manifest.model_hash, prompts=["a"], chunks=2)
    errors = []
    for share in (1.0, 0.05):  # of the largest inputs; what is larger than the scale allows is cut off
        largest = {name: share * value for name, value in found.largest.items()}
        scales = dataclasses.replace(found, largest=largest)
        (plans,) = build(folder, target="current", precision="fp8", calibration=scales)
        made = run_chunks(segments_of(folder, plans, library, ops), toy())
        errors.append(float((made - expected).norm() / expected.norm()))
    # e4m3 rounds both operands of six products a block by up to 1/16; float16 alone is below 0.02
    assert 0.005 < errors[0] < 0.15 and errors[1] > 3 * errors[0]


def test_contexts_share_one_workspace_as_large_as_the_largest(folder, plans, library):
    loaded = runner(folder, plans, library).loaded
    assert len({context.workspace for context in library.contexts}) == 1
    assert library.contexts[0].workspace[1] == loaded.workspace_bytes == stand_in.SIZES["middle"]
    assert loaded.plans == len(plans.files) == TOY.model.layers + 1
    assert loaded.plan_bytes == sum(file.path.stat().st_size for file in plans.files.values())
    assert loaded.weight_bytes == 4000 * loaded.plans


def test_operands_are_bound_where_they_lie(folder, plans, library):
    segments = segments_of(folder, plans, library)
    shape = next(operand.shape for operand in segments.manifest.graph("first").inputs if operand.name == "latents")
    room = torch.zeros(2 * int(np.prod(shape)) + 128)
    place = -room.data_ptr() % tensorrt.ALIGNMENT // 4
    modulation = toy().modulate(1.0)
    addresses = library.contexts[0].addresses
    for offset, copied in ((0, False), (1, True)):
        latents = room[place + offset :][: int(np.prod(shape))].view(shape)
        x, (q, k, v) = segments.first(latents, modulation)
        assert (addresses["latents"] != latents.data_ptr()) == copied
        assert [addresses[name] for name in ("x", "q", "k", "v")] == [t.data_ptr() for t in (x, q, k, v)]


def test_a_second_build_keeps_what_is_there(folder, plans, library):
    built = library.built
    told = []
    build(folder, target="current", precision="fp16", progress=lambda what, done, total: told.append((done, total)))
    assert library.built == built
    assert told[0] == (0, 3) and told[-1] == (3, 3)
    plans.file("middle", 0).path.write_bytes(b"changed")
    build(folder, target="current", precision="fp16")
    assert library.built == built + 1
    assert plans.file("middle", 0).read("")


def test_timings_go_into_the_next_build(folder, plans):
    assert (plans.cache.parent / "timing.cache").read_bytes().startswith(b"+++")


def test_kernels_that_tensorrt_rtx_compiled_are_kept(folder, plans, library):
    runner(folder, plans, library).save_cache()
    assert not plans.cache.exists()  # TensorRT itself compiles nothing
    library.engine = stand_in.RtxEngine
    runner(folder, plans, library).save_cache()
    assert plans.cache.read_bytes() == b"kernels" and library.restored == []
    runner(folder, plans, library)
    assert library.restored == [b"kernels"]
    plans.cache.unlink()


def test_a_cache_that_cannot_be_read_is_no_obstacle(folder, plans, library, monkeypatch):
    library.engine, read = stand_in.RtxEngine, Path.read_bytes

    def refuse(path):
        if path == plans.cache:
            raise PermissionError(13, "Permission denied")
        return read(path)

    plans.cache.write_bytes(b"kernels")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    runner(folder, plans, library)
    assert library.restored == []
    plans.cache.unlink()


def first_pass(segments):
    shape = next(operand.shape for operand in segments.manifest.graph("first").inputs if operand.name == "latents")
    return segments.first(torch.zeros(shape), toy().modulate(1.0))


def test_capture_is_asked_for_on_its_own_stream_before_it_begins(folder, plans, library):
    library.engine, library.capturable = stand_in.RtxEngine, (78,)
    streams = iter([77, 78, 78, 78, 77])
    manifest = Manifest.load(folder)
    made = TensorRTRunner(manifest, plans, "cpu", trt=library, stream=lambda: next(streams))
    assert library.asked == []  # no context has operands yet, nor is the stream known
    segments = GraphSegments(manifest, made, select("cpu"), plans.symbols)
    for _ in range(3):  # another stream, that of the capture, and that again
        first_pass(segments)
    assert library.asked == [77, 78]
    library.capturing = True
    first_pass(segments)
    with pytest.raises(ExportError, match="first 0 cannot be captured .* graphs=False"):
        first_pass(segments)
    assert library.streams == [77, 78, 78, 78]


def test_the_log_of_a_runner_is_bounded(folder, plans, library):
    segments = segments_of(folder, plans, library)
    log = library.log
    for severity in ("ERROR", *["INFO"] * 5000):
        log.log(stand_in.Name(severity), "a line")
    assert len(log.lines) == tensorrt.MESSAGES and list(log.errors) == ["a line"]
    for _ in range(5000):
        log.log(stand_in.Name("ERROR"), "another")
    assert len(log.errors) == tensorrt.MESSAGES
    first_pass(segments)
    assert not log.errors  # a failure later on is not explained by what went before


def test_the_gpu_that_is_meant_is_asked_and_current(library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {"cuda:1": (8, 6), None: (9, 0)}.get)
    assert (tensorrt_library.gpu_library("cuda:1")[1], tensorrt_library.gpu_library()[1]) == ("8.6", "9.0")
    assert tensorrt_library.on_gpu(torch.device("cuda:1")).idx == 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    binding = Binding(Graph("g", "", (), (Operand("x", "float32", (1,)),), ()), "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert binding.device == torch.device("cuda:1")  # as it was when it was made
    elsewhere = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"), ndim=1, shape=(1,))
    with pytest.raises(ExportError, match="lies on cuda:0 and the graph runs on cuda:1"):
        binding.bind({"x": elsewhere})


def test_what_loading_took_is_told(folder, plans, library):
    told = []
    made = runner(folder, plans, library, progress=lambda *step: told.append(step))
    count = TOY.model.layers + 1
    assert [step[1:] for step in told] == [(done, count) for done in range(count + 1)]
    assert told[-1][0] == str(made.loaded) and "3 plans loaded in" in told[-1][0]


def test_a_model_of_one_layer_has_no_middle(folder, plans, library):
    manifest = Manifest.load(folder)
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "middle"}
    files = {key: file for key, file in plans.files.items() if key[0] != "middle"}
    one = dataclasses.replace(manifest, graphs=graphs), dataclasses.replace(plans, files=files)
    assert TensorRTRunner(*one, "cpu", trt=library, stream=lambda: 77).loaded.plans == 2


def test_the_bench_opens_every_precision(folder, library, monkeypatch, tmp_path):
    wide, own = toy(torch.float32), shutil.copytree(folder, tmp_path / "own", ignore=lambda *_: ["tensorrt"])

    def in_float32(config, model, encode, model_hash):  # no kernel for a processor takes float16
        return calibrate(config, wide, lambda prompt: encode(prompt).float(), model_hash, prompts=["a"], chunks=1)

    monkeypatch.setattr("cfengine.export.calibrate.calibrate", in_float32)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    setup = bench.Setup(TOY, torch.device("cpu"), toy(), wide, own)
    expected = bench.reference(setup)
    errors, built = {}, []
    for _ in range(2):
        for backend in ("tensorrt", "tensorrt_fp8"):
            made = bench.in_tensorrt(setup, bench.TENSORRT[backend])
            with torch.inference_mode():
                errors[made.runner.plans.precision] = bench.error(
                    bench.calls(setup, made, setup.dtype, setup.model)["middle"](), expected["middle"]
                )
        built.append(library.built)
    assert built == [6, 6]  # the second time they are in the folder
    # float16 keeps 11 bits; e4m3 rounds both operands of a product by up to 1/16, see above
    assert errors["fp16"] < 0.01 < errors["fp8"] < 0.15
    with pytest.raises(ExportError, match="nvfp4 needs compute capability 12.0"):
        bench.in_tensorrt(setup, "nvfp4")


def test_plans_are_found_by_gpu_precision_and_weights(folder, plans, library, monkeypatch):
    manifest = Manifest.load(folder)
    assert held(manifest).get("fp16").files == plans.files
    assert held(manifest).get("nvfp4") is None
    assert held(dataclasses.replace(manifest, model_hash="0" * 64)).get("fp16") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert held(manifest).get("fp16") is None


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"library_version": "10.9"}, ["tensorrt 10.9", "tensorrt 11.0"]),
        ({"library": "tensorrt_rtx"}, ["tensorrt_rtx 11.0", "tensorrt 11.0"]),
        ({"model_hash": "0" * 64}, ["0" * 12]),
        ({"files": {}}, ["no plan of first 0"]),
    ],
)
def test_plans_of_something_else_are_refused(folder, plans, library, change, words):
    with pytest.raises(ExportError) as caught:
        runner(folder, dataclasses.replace(plans, **change), library)
    for word in [*words, plans.command]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "damaged"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_spoilt_plan_is_named(folder, plans, library, spoil, words):
    path = plans.file("last", 0).path
    spoil(path)
    with pytest.raises(ExportError, match=words) as caught:
        runner(folder, plans, library)
    assert str(path) in str(caught.value) and plans.command in str(caught.value)


def test_a_plan_that_does_not_load_says_why(folder, plans, library):
    file, data = plans.file("first", 0), b"no engine at all"
    file.path.write_bytes(data)
    told = dataclasses.replace(file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ExportError, match="magic tag does not match") as caught:
        runner(folder, dataclasses.replace(plans, files=plans.files | {("first", 0): told}), library)
    assert "compute capability 9.0" in str(caught.value)


def test_an_engine_of_other_operands_is_refused(folder, plans, library):
    swapped = plans.files | {("first", 0): plans.file("last", 0)}
    with pytest.raises(ExportError, match="has operands .*flow"):
        runner(folder, dataclasses.replace(plans, files=swapped), library)
    with pytest.raises(ExportError, match=r"cross_k .* HALF \[1, 16, 2, 64\] .* says HALF \[1, 15, 2, 64\]"):
        runner(folder, dataclasses.replace(plans, symbols={"keys": 15, "sessions": 1}), library)


def test_an_address_that_is_refused_is_an_error_and_nothing_runs(folder, plans, library):
    segments = segments_of(folder, plans, library)
    first_pass(segments)  # its addresses must not be taken for those of the next
    library.refused = ("x",)
    with pytest.raises(ExportError, match="refuses the address of x, .* for first 0 of .*: x is no address") as caught:
        first_pass(segments)
    assert plans.command in str(caught.value) and library.streams == [77]


def test_a_full_gpu_is_said(folder, plans, library, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(DeviceError, match="left for the workspace of"):
        runner(folder, plans, library)


def test_an_engine_for_one_session_takes_no_two(tmp_path):
    graph = Graph("g", "", (), (Operand("x", "float32", ("2*sessions",)),), ())
    with pytest.raises(ExportError, match="built for sessions = 1 alone; open sessions one by one"):
        Binding(graph, fixed={"keys": 4, "sessions": 1}).bind({"x": torch.zeros(4)})


def test_operands_that_a_graph_has_not_are_refused_by_onnx_runtime(folder):
    manifest = Manifest.load(folder)
    graph = manifest.graph("first")
    operand = Operand("more", "float32", (1,))
    more = dataclasses.replace(graph, outputs=(*graph.outputs, operand))
    segments = GraphSegments(
        dataclasses.replace(manifest, graphs=manifest.graphs | {"first": more}), OnnxRunner(manifest), select("cpu")
    )
    with pytest.raises(ExportError, match="'first', weights 0, failed in ONNX Runtime: .*more"):
        first_pass(segments)


def test_a_failed_launch_is_an_error(folder, plans, library):
    segments = segments_of(folder, plans, library)
    library.broken = True
    model = toy()
    with pytest.raises(DeviceError, match="the kernel is lost"):
        run_chunks(segments, model)


def test_another_gpu_is_told_which_plans_there_are(plans):
    with pytest.raises(ExportError, match=r"compute capability 9\.0 and this GPU has 8\.9; .* --target current"):
        Plans.load(plans.folder, "8.9")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no plans.json"),
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"format": "cfengine-plans", "version": 99}), "99"),
        (json.dumps({"format": "cfengine-plans", "version": 1}), "damaged"),
    ],
)
def test_a_spoilt_description_is_named(tmp_path, text, words):
    place = tmp_path / "tensorrt" / "rtx-fp8"
    place.mkdir(parents=True)
    if text:
        (place / NAME).write_text(text)
    with pytest.raises(ExportError, match=words) as caught:
        Plans.load(place, "8.9")
    assert f"cfengine export tensorrt {tmp_path} --target rtx --precision fp8" in str(caught.value)
