"""The Hopper attention without a GPU: emulated against the reference, caught where a wait is missing, and compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cfengine
from cfengine.errors import KernelError
from cfengine.kernels.paged_attention.cases import FP8_TOLERANCE, TOLERANCE, Shape, make, narrow
from cfengine.kernels.paged_attention.reference import paged_attention as reference
from cfengine.ops import select
from cfengine.testing.replay import replay

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("sm90_emulator_build", HERE / "emulator" / "build.py")
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)

SOURCES = ("turns.cu", "sm80.cu", "sm90.cu")  # the binding calls the kernel for all GPUs too
HALVES = (torch.bfloat16, torch.float16)
pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Folder of what the emulator compiled, `_emulated` included."""
    lacking = emulator.missing()
    if lacking:
        pytest.skip(f"the CUDA kernels are not emulated: {lacking}")
    folder = tmp_path_factory.mktemp("emulated")
    emulator.build(SOURCES, folder)
    return folder


def attention_of(library: Path):
    """attention(multiprocessors, seed) -> cuda.paged_attention over the Hopper kernel of a library for the host."""
    built = emulator.load(f"{library.parent.name}._emulated", library)  # pybind11 keeps one module of a name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfengine, "_C", built, raising=False)
        patch.setitem(sys.modules, "cfengine._C", built)
        module = emulator.load("cfengine.kernels.paged_attention.emulated_sm90", emulator.ATTENTION / "cuda.py")
    module._stream = lambda index: 0

    def make_attention(multiprocessors: int, seed: int = 0):
        built.set_seed(seed)
        module._device = lambda index: module.Device(90, multiprocessors, True)
        return lambda *given, **scales: module.paged_attention(
            *map(emulator.guarded, given), **{name: emulator.guarded(scale) for name, scale in scales.items()}
        )

    return make_attention


@pytest.fixture(scope="module")
def attention(objects):
    return attention_of(next(objects.glob("_emulated*")))


def rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared error over that of the expected values; infinite where anything is not finite."""
    return float((found - expected).norm() / expected.norm()) if torch.isfinite(found).all() else math.inf


def operands(shape, dtype, unused=0):
    """Operands at large positions; values differ in size from page to page; pages that must not count are NaN."""
    q, k, v, *table = make(shape, dtype, seed=shape.page_tokens, first_position=1_000_000, unused=unused)
    v *= 2.0 ** (torch.arange(len(v)) % 7 - 3)[:, None, None, None]
    shown = set(table[0][: shape.slots - unused].tolist())
    hidden = [page for page in range(len(k)) if page not in shown]
    k[hidden], v[hidden] = math.nan, math.nan
    return q, k, v, *table


def e4m3_operands(shape, dtype, unused=0):
    q, k, v, *table = operands(shape, dtype, unused)
    zero = table[0][0] if shape.slots - unused > 1 else []  # a slot never written
    k[zero] = v[zero] = 0
    k, v, scales = narrow(k, v)
    scales["k_scale"][zero] = scales["v_scale"][zero] = 0
    return (q, k, v, *table), scales


# multiprocessors: 1 gives rounds of whole tiles alone, more split the keys of some tiles or of all
CASES = [
    (Shape(130, 1, 4, 1, 128), 2, 1),  # a narrow last tile; 2 query tiles, each whole
    (Shape(280, 1, 3, 1, 128), 2, 2),  # 3 query tiles on 2 multiprocessors: a whole one each, the third split
    (Shape(280, 1, 4, 2, 64), 5, 1),  # all but a round split
    (Shape(200, 1, 3, 1, 128), 7, 0),  # a wide last tile; more multiprocessors than pieces
    (Shape(256, 1, 2, 1, 64), 1, 0),  # pages are whole tiles
    (Shape(36, 3, 5, 2, 128), 3, 2),  # pages smaller than a tile; query tiles span three latent frames
    (Shape(7, 3, 3, 1, 64), 2, 0),  # odd
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "multiprocessors", "unused"), CASES)
def test_matches_the_reference(attention, measure, widen, shape, multiprocessors, unused, dtype):
    given = operands(shape, dtype, unused)
    expected = reference(*widen(given))
    for seed in range(2):
        assert measure(attention(multiprocessors, seed)(*given), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "multiprocessors", "unused"), [c for c in CASES if c[0].page_tokens % 4 == 0])
def test_matches_the_reference_with_e4m3_pages(attention, shape, multiprocessors, unused, dtype):
    (q, *rest), scales = e4m3_operands(shape, dtype, unused)
    expected = reference(q.double(), *rest, **scales)
    for seed in range(2):
        assert rms(attention(multiprocessors, seed)(q, *rest, **scales).double(), expected) <= FP8_TOLERANCE


@pytest.mark.parametrize("pages", ["bfloat16", "e4m3"])
def test_results_do_not_depend_on_the_schedule(attention, pages):
    shape = Shape(280, 1, 3, 1, 128)
    given, scales = e4m3_operands(shape, torch.bfloat16) if pages == "e4m3" else (operands(shape, torch.bfloat16), {})
    first, *others = (attention(4, seed)(*given, **scales) for seed in range(3))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("pages", ["bfloat16", "e4m3"])
def test_a_table_that_shows_nothing_gives_zeros(attention, pages):
    """Count 0: the first slot holds page 0, of zeros; nobody waits for keys that nobody loads."""
    q, k, v, *table = make(Shape(140, 1, 2, 1, 64), torch.bfloat16)
    k, v, scales = torch.zeros_like(k), torch.zeros_like(v), {}
    if pages == "e4m3":
        k, v, scales = narrow(k, v)
    table[2].zero_()
    for multiprocessors in (1, 3):  # whole tiles, and split ones
        assert not attention(multiprocessors)(q, k, v, *table, **scales).any()


# Two goldens, all passes of each; the head sizes that the kernel is built for, and both types.
@pytest.mark.parametrize(("stem", "dtype"), [("memory_head64", torch.bfloat16), ("memory_head128", torch.float16)])
def test_recorded_traces_replay(attention, stem, dtype):
    ours = dataclasses.replace(select("cpu", prefer="reference"), paged_attention=hopper(attention(3)))
    report = replay(emulator.ROOT / "tests" / "data" / f"{stem}.safetensors", ours, dtype=dtype)
    assert not report.failed, (report.mismatches[:5], report.worst)


def hopper(serve):
    """The emulated kernel as an operation: it takes the default theta alone."""

    def paged_attention(*given, theta, **scales):
        assert theta == 10000.0
        return serve(*given, **scales)

    return paged_attention


def test_pages_of_no_multiple_of_4_go_to_the_kernel_for_all_gpus(attention):
    (q, *rest), scales = e4m3_operands(Shape(6, 1, 2, 1, 64), torch.bfloat16)
    expected = reference(q.double(), *rest, **scales)
    assert rms(attention(1)(q, *rest, **scales).double(), expected) <= FP8_TOLERANCE


def test_what_cannot_be_served_is_said(attention):
    with pytest.raises(KernelError, match="a chunk has 17 frames but at most 16"):
        attention(1)(*operands(Shape(2, 17, 17, 1, 64), torch.bfloat16))


# What each change breaks shows as NaN, as a wrong result or as an error of the emulator, on one of a few schedules.
FAULTS = {
    "none, wide": ("sm90_wide.cuh", "", ""),  # the control: the build of every fault, without one
    "none, e4m3": ("sm90_e4m3.cuh", "", ""),
    "keys not waited for": ("sm90_wide.cuh", "mbarrier_wait(&shared.k_full[keys.stage], keys.phase);", ""),
    "values not waited for": ("sm90_wide.cuh", "mbarrier_wait(&shared.v_full[values.stage], values.phase);", ""),
    "keys overwritten": ("sm90_load.cuh", "mbarrier_wait(&shared.k_empty[s], ring.phase ^ 1);", ""),
    "scores not waited for": ("sm90_wide.cuh", "wgmma_wait<Before ? 1 : 0>();", "wgmma_wait<2>();"),
    "sums not waited for": ("sm90_e4m3.cuh", "        wgmma_wait<0>();\n", "        wgmma_wait<1>();\n"),
    "no fence": ("sm90_e4m3.cuh", "        wgmma_fence();\n", ""),
    "masked keys times 0": (
        "sm90_load.cuh",
        "fmaxf(__ldg(job.k_scale + place), kLeastKeyScale)",
        "__ldg(job.k_scale + place)",
    ),
    "keys in another order": ("sm90_load.cuh", "full, 0, 2 * j, key / 4", "full, 0, 2 - 2 * j, key / 4"),
}


def with_fault(folder: Path, objects: Path, place: str, right: str, wrong: str) -> Path:
    """Build a library whose Hopper kernel has `wrong` for `right` in one of its files."""
    for file in emulator.ATTENTION.glob("sm90*"):
        shutil.copy(file, folder)
    text = (folder / place).read_text()
    assert right in text
    (folder / place).write_text(text.replace(right, wrong))
    dispatch = (folder / "sm90.cu").read_text()  # compiled for what the test runs alone
    for rest in (r"case AttentionType::f16\w*: .*\n", r"run_rest<Q, Page, 64>\(launch\)", r"run<.*, kKeys>>\(launch\)"):
        dispatch = re.sub(rest, "", dispatch)
    (folder / "sm90.cu").write_text(dispatch)
    include = [f"-I{path}" for path in (emulator.HERE, emulator.ROOT / "csrc", emulator.ATTENTION)]
    made = folder / "sm90.cu.o"
    compiler = ["g++", *emulator.FLAGS, "-Wno-switch", "-DCF_EMULATE", *include, "-x", "c++", "-c"]
    subprocess.run([*compiler, str(folder / "sm90.cu"), "-o", str(made)], check=True)
    others = [str(o) for o in objects.glob("*.o") if o.name != made.name]
    library = folder / next(objects.glob("_emulated*")).name
    subprocess.run(["g++", "-shared", *others, str(made), "-o", str(library)], check=True)
    return library


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_catches(fault, objects, tmp_path, widen):
    """Every fault on one of 24 schedules, and nothing on any of them in the same build without a fault."""
    attention, noticed = attention_of(with_fault(tmp_path, objects, *FAULTS[fault])), False
    shape = Shape(280, 1, 3, 1, 128)
    if FAULTS[fault][0] == "sm90_wide.cuh":
        given, scales = operands(shape, torch.bfloat16), {}
    else:
        given, scales = e4m3_operands(shape, torch.bfloat16)
    expected = reference(*(given if scales else widen(given)), **scales).double()
    for seed in range(24):
        try:
            noticed = not rms(attention(2, seed)(*given, **scales).double(), expected) <= FP8_TOLERANCE
        except KernelError:
            noticed = True
        if noticed:
            break
    assert noticed != fault.startswith("none")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_compiles_without_spills_and_without_serialised_products(tmp_path):
    """No local memory, and none of the assembler's notes (C75xx) that products wait for each other."""
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    flags += ['-DCF_CUDA_ARCHITECTURES="90a"', f"-I{emulator.ROOT / 'csrc'}"]
    files = ["-cubin", str(emulator.ATTENTION / "sm90.cu"), "-o", str(tmp_path / "sm90.cubin")]
    run = subprocess.run(["nvcc", *flags, *files], capture_output=True, text=True)
    report = run.stdout + run.stderr
    assert run.returncode == 0, report[-4000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) >= 16 and all(frame == ("0", "0", "0") for frame in frames), report[-4000:]
    assert not re.search(r"\(C75\d\d\)", report), report[:4000]
