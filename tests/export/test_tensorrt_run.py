"""Plans built and run by a stand-in for TensorRT whose engines are ONNX Runtime's, so that all around them is real."""

import ctypes
import dataclasses
import hashlib
import json
import sys
import types

import numpy as np
import pytest
import torch

from cfengine.bench.synthetic import SIZES as CONFIGS
from cfengine.bench.synthetic import random_weights
from cfengine.errors import DeviceError, ExportError
from cfengine.export.build import build
from cfengine.export.calibrate import calibrate
from cfengine.export.folder import export
from cfengine.export.tensorrt_backend import find_plans
from cfengine.memory.memory import Memory
from cfengine.model.dit import CausalDiT
from cfengine.ops import select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.program import PromptBuffers
from cfengine.scheduler.sampler import Schedule, chunk_noise
from cfengine.segments import tensorrt
from cfengine.segments.exported import GraphSegments
from cfengine.segments.manifest import Manifest
from cfengine.segments.tensorrt import TensorRTRunner
from cfengine.segments.tensorrt_plans import NAME, Plans
from cfengine.segments.torch import TorchSegments

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.cpu

TOY = CONFIGS["toy"]
NUMPY = {"HALF": np.float16, "FLOAT": np.float32}
SIZES = {"first": 1000, "middle": 3000, "last": 2000}  # bytes of workspace that the engines ask for


class Name:
    def __init__(self, name):
        self.name = name


class Context:
    def __init__(self, engine, library):
        self.engine, self.library, self.addresses, self.workspace = engine, library, {}, None

    def set_device_memory(self, pointer, size):
        self.workspace = pointer, size

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        if self.library.broken:
            self.library.log.log(Name("ERROR"), "the kernel\nis lost")
            return False
        self.library.streams.append(stream)
        pointer, size = self.workspace
        assert size >= self.engine.device_memory_size_v2
        ctypes.memset(pointer, 255, size)  # what another engine left there must not matter
        session = self.engine.session
        inputs = {i.name: self._array(i.name).copy() for i in session.get_inputs()}
        for output, value in zip(session.get_outputs(), session.run(None, inputs), strict=True):
            self._array(output.name)[:] = value
        return True

    def _array(self, name):
        shape, kind = self.engine.get_tensor_shape(name), NUMPY[self.engine.get_tensor_dtype(name).name]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        memory = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.frombuffer(memory, kind).reshape(shape)


class Engine:
    def __init__(self, library, data):
        import onnxruntime

        self.library = library
        self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self._operands = {o.name: o for o in (*self.session.get_inputs(), *self.session.get_outputs())}
        graph = "first" if "latents" in self._operands else "last" if "flow" in self._operands else "middle"
        self.device_memory_size_v2, self.num_io_tensors = SIZES[graph], len(self._operands)

    def get_tensor_name(self, i):
        return list(self._operands)[i]

    def get_tensor_dtype(self, name):
        return Name("HALF" if self._operands[name].type == "tensor(float16)" else "FLOAT")

    def get_tensor_shape(self, name):
        return tuple(self._operands[name].shape)

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        self.library.contexts.append(Context(self, self.library))
        return self.library.contexts[-1]


class RtxEngine(Engine):
    """As TensorRT-RTX has it: contexts are made with a cache of compiled kernels."""

    def create_runtime_config(self):
        return RtxConfig(self.library)

    def create_execution_context(self, config):
        assert config.cache is self.library.cache
        return super().create_execution_context(config.strategy)


class RtxConfig:
    def __init__(self, library):
        self.library, self.strategy, self.cache = library, None, None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        self.library.cache = types.SimpleNamespace(
            serialize=lambda: b"kernels", deserialize=self.library.restored.append
        )
        return self.library.cache

    def set_runtime_cache(self, cache):
        self.cache = cache


class Parser:
    def __init__(self, network, log):
        self.network, self.num_errors = network, 0

    def parse(self, data):
        self.network["data"] = data
        return True


class Config:
    profiling_verbosity = max_aux_streams = None

    def set_memory_pool_limit(self, pool, size):
        pass

    def create_timing_cache(self, data):
        self.timings = bytes(data)
        return self.timings

    def set_timing_cache(self, cache, ignore_mismatch):
        pass

    def get_timing_cache(self):
        return types.SimpleNamespace(serialize=lambda: self.timings + b"+")


class Library:
    """As much of the module `tensorrt` as is used here."""

    __name__, __version__ = "tensorrt", "11.0"

    def __init__(self):
        self.contexts, self.streams, self.built, self.broken = [], [], 0, False
        self.engine, self.restored = Engine, []
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.MemoryPoolType = types.SimpleNamespace(WORKSPACE=0)
        self.ProfilingVerbosity = types.SimpleNamespace(DETAILED=2)
        self.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
        self.ILogger, self.OnnxParser = object, Parser

    def Builder(self, log):
        def build(network, config):
            self.built += 1
            log.log(Name("INFO"), "Total Weights Memory: 4000 bytes")
            return network["data"]

        return types.SimpleNamespace(
            create_network=lambda flags: {}, create_builder_config=Config, build_serialized_network=build
        )

    def Runtime(self, log):
        def load(data):
            self.log = log
            if data.startswith(b"no engine"):
                log.log(Name("ERROR"), "magic tag does not match")
                return None
            return self.engine(self, data)

        return types.SimpleNamespace(deserialize_cuda_engine=load)


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
    made = Library()
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
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
    assert library.contexts[0].workspace[1] == loaded.workspace_bytes == SIZES["middle"]
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
    library.engine = RtxEngine
    runner(folder, plans, library).save_cache()
    assert plans.cache.read_bytes() == b"kernels" and library.restored == []
    runner(folder, plans, library)
    assert library.restored == [b"kernels"]
    plans.cache.unlink()


def test_plans_are_found_by_gpu_precision_and_weights(folder, plans, library, monkeypatch):
    manifest = Manifest.load(folder)
    assert find_plans(manifest, "fp16").files == plans.files
    assert find_plans(manifest, "nvfp4") is None
    assert find_plans(dataclasses.replace(manifest, model_hash="0" * 64), "fp16") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert find_plans(manifest, "fp16") is None


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
