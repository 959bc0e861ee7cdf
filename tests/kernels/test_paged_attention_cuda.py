"""The CUDA attention against its float64 reference: its sources run by the emulator, and on a GPU where there is one.

The emulator (tests/kernels/emulator) runs the kernels' own sources on the host, thread by thread in a random order.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import cfengine
from cfengine.errors import KernelError
from cfengine.kernels.paged_attention.cases import FP8_TOLERANCE, TOLERANCE, Shape, make, narrow
from cfengine.kernels.paged_attention.reference import paged_attention as reference

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("cuda_emulator_build", HERE / "emulator" / "build.py")
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)

HALVES = (torch.float16, torch.bfloat16)
SHAPES = (
    Shape(25, 3, 5, 2, 64),  # a page shorter than a tile of keys; tiles of queries span latent frames
    Shape(130, 1, 3, 1, 128),  # a tail of 2 keys and one of 2 queries
    Shape(56, 3, 4, 2, 128),  # a tail of 24, as pages of 1,560 keys have
    Shape(64, 2, 3, 3, 64),  # no tail
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The module of emulated kernels."""
    lacking = emulator.missing()
    if lacking:
        pytest.skip(f"the CUDA kernels are not emulated: {lacking}")
    return emulator.build(("turns.cu", "sm80.cu"), tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def emulated(built):
    """emulated(multiprocessors, seed) -> cuda.paged_attention over the kernels that run on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfengine, "_C", built, raising=False)
        patch.setitem(sys.modules, "cfengine._C", built)
        module = emulator.load("cfengine.kernels.paged_attention.emulated", emulator.ATTENTION / "cuda.py")

    def make_attention(multiprocessors: int, seed: int = 0):
        built.set_seed(seed)
        module._device = lambda index: module.Device(80, multiprocessors, True)
        module._stream = lambda index: 0
        return module.paged_attention

    return make_attention


def operands_of(shape: Shape, dtype: torch.dtype, unused: int = 0):
    """Operands at the end of their memory; pages beyond `count` are NaN."""
    operands = make(shape, dtype, unused=unused)
    for pages in operands[1:3]:
        pages[operands[3][shape.slots - unused :].long()] = float("nan")
    return tuple(map(emulator.guarded, operands))


def rms(found, expected) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiprocessors", [1, 2, 7])  # whole tiles alone, whole and split ones, split ones alone
def test_emulated(emulated, shape, dtype, multiprocessors, measure, widen):
    operands = operands_of(shape, dtype, unused=1)
    found = emulated(multiprocessors)(*operands)
    assert found.dtype == dtype and found.shape == operands[0].shape
    assert measure(found, reference(*widen(operands))) < TOLERANCE[dtype]


@pytest.mark.cpu
@pytest.mark.parametrize("seed", range(1, 9))
def test_emulated_in_another_order(emulated, seed):
    operands = operands_of(SHAPES[1], torch.bfloat16)
    assert torch.equal(emulated(2, seed)(*operands), emulated(2)(*operands))


@pytest.mark.cpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_emulated_e4m3(emulated, shape, multiprocessors, widen):
    q, k, v, *table = make(shape, torch.bfloat16, unused=1)
    v = v * torch.linspace(0.1, 10, len(v))[:, None, None, None]  # scales that differ between pages
    v[table[0][0]] = 0
    k, v, scales = narrow(k, v)
    scales["v_scale"][table[0][0]] = 0  # as a page of zeros may have it
    found = emulated(multiprocessors)(*map(emulator.guarded, (q, k, v, *table)), **scales)
    assert rms(found, reference(q.double(), k, v, *table, **scales)) < FP8_TOLERANCE


@pytest.mark.cpu
def test_emulated_at_positions_in_the_millions(emulated, measure, widen):
    operands = list(make(SHAPES[0], torch.float16))
    operands[6] += 5_000_000  # far from every key, as a sink is from the queries of an old stream
    assert measure(emulated(1)(*operands), reference(*widen(operands))) < TOLERANCE[torch.float16]


@pytest.mark.cpu
def test_strides_of_a_fused_projection(emulated, measure, widen):
    q, *rest = make(SHAPES[2], torch.float16)
    q = torch.cat([q, q + 1, q + 2], dim=-1)[..., : q.shape[-1]]
    assert measure(emulated(2)(q, *rest), reference(*widen((q, *rest)))) < TOLERANCE[torch.float16]


@pytest.mark.cpu
def test_what_cannot_be_served(emulated):
    q, k, v, *table = make(SHAPES[0], torch.float16)
    wide = torch.nn.functional.pad(k, (0, 4))[..., : k.shape[-1]]  # rows of 136 bytes
    with pytest.raises(KernelError, match="a stride of k_pages is 68 elements, 136 bytes, but must"):
        emulated(1)(q, wide, v, *table)
    with pytest.raises(KernelError, match="v_pages is float32 but float16 is expected"):
        emulated(1)(q, k, v.float(), *table)


# The emulator itself --------------------------------------------------------------------------------------------------


def faulty(built, name: str, seed: int) -> bool:
    """Run a kernel that reverses groups of four floats, without what is named; whether its result is right."""
    built.set_seed(seed)
    given, found = emulator.guarded(torch.arange(256.0)), emulator.guarded(torch.zeros(256))
    built.run_fault(name, given.data_ptr(), found.data_ptr())
    return torch.equal(found.view(-1, 4), given.view(-1, 4).flip(0))


@pytest.mark.cpu
def test_a_missing_wait_or_barrier_shows(built):
    assert all(faulty(built, "none", seed) for seed in range(8))
    assert not any(faulty(built, "no wait", seed) for seed in range(8))
    assert not any(faulty(built, "no barrier", seed) for seed in range(8))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stray", "touches memory outside of its operands"),
        ("stuck", "all threads wait: warp 0 in barrier_sync"),
        ("diverged", "lanes of a warp meet in"),
        ("beyond", "copy_async at byte 1024 of 1024 of shared memory"),
    ],
)
def test_faults_are_told(built, fault, message):
    with pytest.raises(KernelError, match=message):
        faulty(built, fault, 0)


# On a GPU -------------------------------------------------------------------------------------------------------------

GPU_SHAPES = (*SHAPES, Shape(390, 3, 21, 12, 128), Shape(1560, 3, 21, 2, 128))


@pytest.fixture
def attention():
    """The kernels of cfengine._C; a test skips visibly where they are not built or cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    name = "cfengine.kernels.paged_attention.cuda"
    return pytest.importorskip(name, reason="cfengine._C is built without CUDA", exc_type=ImportError).paged_attention


def on_gpu(operands):
    """Copies with the same strides: `.cuda()` would move the padded values of e4m3 pages together."""
    return tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t) for t in operands)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_on_gpu(attention, shape, dtype, measure, widen):
    operands = on_gpu(make(shape, dtype, unused=1))
    assert measure(attention(*operands), reference(*widen(operands))) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_on_gpu_the_kernel_for_all(attention, shape, measure, widen, monkeypatch):
    """sm80.cu, also where another kernel is the first choice."""
    module = importlib.import_module("cfengine.kernels.paged_attention.cuda")
    device = module._device(0)._replace(kernel=80)
    monkeypatch.setattr(module, "_device", lambda index: device)
    operands = on_gpu(make(shape, torch.bfloat16, unused=1))
    assert measure(attention(*operands), reference(*widen(operands))) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_e4m3_on_gpu(attention, shape):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    q, k, v, *table = make(shape, torch.bfloat16, unused=1)
    k, v, scales = narrow(k, v)
    found = attention(*on_gpu((q, k, v, *table)), **{name: scale.cuda() for name, scale in scales.items()})
    assert rms(found.cpu(), reference(q.double(), k, v, *table, **scales)) < FP8_TOLERANCE


@pytest.mark.gpu
def test_one_capture_serves_every_count(attention, measure, widen):
    operands = on_gpu(make(Shape(390, 3, 6, 12, 128), torch.bfloat16))
    attention(*operands)  # tables are filled, functions loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention(*operands)
    for count in (6, 3, 1, 5):
        operands[5].fill_(count)
        graph.replay()
        assert measure(found, reference(*widen(operands))) < TOLERANCE[torch.bfloat16]
