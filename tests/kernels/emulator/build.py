"""Builds CUDA sources for the host with g++ (fibers.h), and lends memory that ends at a guard page."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ATTENTION = ROOT / "kernels" / "paged_attention"
PYBIND = Path(torch.__file__).parent / "include"  # torch brings pybind11
PYTHON = Path(sysconfig.get_paths()["include"])
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas")


def missing() -> str | None:
    """What this machine lacks to build the emulator, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the emulator's fibers are written for Linux on x86-64"
    if shutil.which("g++") is None:
        return "g++ was not found"
    headers = (PYBIND / "pybind11" / "pybind11.h", PYTHON / "Python.h")
    return next((f"{header} is not there" for header in headers if not header.is_file()), None)


def build(sources: tuple[str, ...], folder: Path) -> ModuleType:
    """Compile CUDA sources of paged attention as C++ into a module `_emulated` in a folder, and import it."""
    include = [f"-I{path}" for path in (HERE, ROOT / "csrc", ATTENTION, PYBIND, PYTHON)]
    defines = ["-DCF_EMULATE", *(["-DCF_HAS_SM90"] if "sm90.cu" in sources else [])]
    runs = {}
    for source in (HERE / "module.cpp", *(ATTENTION / name for name in sources)):
        made = folder / f"{source.name}.o"
        command = ["g++", *FLAGS, *defines, *include, "-x", "c++", "-c", str(source), "-o", str(made)]
        runs[made] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for made, run in runs.items():
        errors = run.communicate()[1]
        assert run.returncode == 0, f"g++ refuses {made.stem}\n{errors[-6000:]}"
    target = folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *map(str, runs), "-o", str(target)], check=True)
    return load("_emulated", target)


def load(name: str, path: Path) -> ModuleType:
    """Import a file under a name of our choice."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor, strides included, to memory whose end meets a page that may not be touched."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    used = span * tensor.element_size()
    whole = -(-used // 16) * 16  # starts stay multiples of 16
    pages = -(-whole // mmap.PAGESIZE)
    area = torch.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), dtype=torch.uint8)
    guard = ctypes.c_void_p(area.data_ptr() + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    start = pages * mmap.PAGESIZE - whole
    copy = area[start : start + used].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor)
