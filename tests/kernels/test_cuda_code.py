"""The CUDA sources compile for the GPUs we name, without one, and the attention keeps its state in registers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / "paged_attention"
# Bytes of shared memory that a block may have (CUDA C++ programming guide, compute capabilities);
# sm90.cu asserts its own.
SHARED = {"80": 163 << 10, "89": 99 << 10, "120": 99 << 10}
PRODUCTS = {"sm80.cu": ("HMMA", "QMMA"), "sm90.cu": ("HGMMA", "QGMMA")}
TARGETS = [("turns.cu", "80"), ("sm80.cu", "80"), ("sm80.cu", "89"), ("sm80.cu", "120"), ("sm90.cu", "90a")]


class Report(NamedTuple):
    """What ptxas says of one kernel."""

    name: str
    stack: int
    spills: int
    registers: int


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("nvcc was not found")
    return found


def release(compiler: str) -> tuple[int, int]:
    says = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", says).groups()
    return int(major), int(minor)


def reports(text: str) -> list[Report]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    found = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        stack = int(re.search(r"(\d+) bytes stack frame", part)[1])
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found.append(Report(part.split("'")[0], stack, spills, registers))
    return found


@pytest.mark.parametrize(("source", "target"), TARGETS)
def test_no_kernel_spills(source, target, tmp_path):
    compiler = nvcc()
    if target == "120" and release(compiler) < (12, 8):
        pytest.skip("compute capability 12.0 needs nvcc 12.8")
    made = tmp_path / "kernels.cubin"
    command = [
        compiler, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", '-DCF_CUDA_ARCHITECTURES="test"', "-Xptxas", "-v",
        "--cubin", f"-gencode=arch=compute_{target},code=sm_{target}", str(FOLDER / source), "-o", str(made),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = reports(run.stdout + run.stderr)
    assert kernels
    for kernel in kernels:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel
        assert kernel.registers <= 255
    # setmaxnreg was ignored, or products wait for each other
    assert not re.search(r"\(C75\d\d\)", run.stdout + run.stderr)
    check_instructions(made, source, target)


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else ROOT
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(own))


def check_instructions(cubin: Path, source: str, target: str) -> None:
    """Products run on the tensor cores: HMMA and QMMA of a warp, HGMMA and QGMMA of Hopper's warp groups."""
    disassembler = cuobjdump()
    if disassembler is None or source not in PRODUCTS:
        return
    code = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for instruction in PRODUCTS[source][: 1 if target == "80" else 2]:  # 8.0 has no e4m3
        assert f" {instruction}." in code, f"{source} has no {instruction} for {target}"
    assert not re.search(r"\b(LDL|STL)\b", code)  # no local memory


def test_shared_memory_fits():
    """What sm80.cu asks for, by its own constants: queries and a ring of key and value tiles."""
    text = (FOLDER / "sm80_shape.cuh").read_text()
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", text))
    rows, keys, stages = (int(constants[name]) for name in ("kRows", "kKeys", "kStages"))
    for number in (1, 2):
        needed = 128 * number * (rows + stages * 2 * keys)
        assert all(needed <= SHARED[target] for target in ("80", "89", "120"))
