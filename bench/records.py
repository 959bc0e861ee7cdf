"""Benchmark records: the JSON that every bench writes."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from pathlib import Path

from cfengine.errors import OutputError


def device_name() -> str:
    """Name the machine: the GPU that torch would use, else the processor and its core count."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def line(entry: dict) -> str:
    """Name, value and unit of a record, and the ratio with what it compares with."""
    value = "-" if entry["value"] is None else f"{entry['value']:.4g}"
    ratio = "" if entry["ratio"] is None else f"   {entry['ratio']:.3g} x {entry['baseline']}"
    return f"{entry['name']:<46}{value:>10} {entry['unit']}{ratio}"


@functools.cache
def software() -> dict[str, str | None]:
    """Versions that a speed depends on; None for what is not there."""
    import torch

    try:
        import triton
    except ImportError:
        triton = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton and triton.__version__,
        "driver": driver(),
    }


def driver() -> str | None:
    """Version of the NVIDIA driver, or None."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def commit() -> str:
    """Return the commit of the checkout that holds this file, `-dirty` appended where it differs, or `unknown`."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def record(name: str, value: float | None, unit: str, baseline=None, ratio: float | None = None, config=None) -> dict:
    """Return one measurement; `baseline` names what `ratio` compares with, `config` says shapes and types."""
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": ratio,
        "config": config,
        "device": device_name(),
        "commit": commit(),
        "software": software(),
    }


def write(path: str | Path, records: list[dict]) -> None:
    """Write records as one JSON list; OutputError where the place cannot be written to."""
    path = Path(path)
    if not path.resolve().parent.is_dir():
        parent = path.resolve().parent
        raise OutputError(f"folder {parent} does not exist; make it first, or give another path than {path}")
    try:
        path.write_text(json.dumps(records, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; give a path that can be written to") from None
