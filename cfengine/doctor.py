"""Examination of a machine and a build: what runs what, what is missing, and the command that adds it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cfengine.config import PRESETS, cache_dir

INSTALL = "pip install -e ."
DEFAULT_PRESET = "tiny-world"
MARKS = {"ok": ("green", "ok"), "note": ("yellow", "--"), "missing": ("red", "missing")}

# distribution, module it is imported as, what it is for, extra of this package that brings it ("" for the base)
PACKAGES = (
    ("torch", "torch", "everything", ""),
    ("numpy", "numpy", "everything", ""),
    ("safetensors", "safetensors", "weights", ""),
    ("av", "av", "video files", ""),
    ("typer", "typer", "the command line", ""),
    ("rich", "rich", "the command line", ""),
    ("huggingface_hub", "huggingface_hub", "weights from the hub", ""),
    ("c2pa-python", "c2pa", "the signed record in a video that it is synthetic", ""),
    ("cryptography", "cryptography", "the key that signs it", ""),
    ("transformers", "transformers", "the UMT5 text encoder of the Wan models", "text"),
    ("sentencepiece", "sentencepiece", "the tokenizer of the Wan models", "text"),
    ("ftfy", "ftfy", "prompt cleaning of the Wan models", "text"),
    ("diffusers", "diffusers", "the Wan VAE", "wan"),
    ("onnx", "onnx", "export", "export"),
    ("onnxruntime", "onnxruntime", "export, checked on any CPU", "export"),
    ("tensorrt-rtx", "tensorrt_rtx", "engines for RTX GPUs, built without one", "tensorrt"),
)


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, note (optional, absent) or missing (needed, absent); `remedy` a command or sentence."""

    name: str
    text: str
    state: str = "ok"
    remedy: str = ""


@dataclass
class Report:
    """Findings by section, in the order they are shown."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether nothing that the default command needs is missing."""
        return all(finding.state != "missing" for findings in self.sections.values() for finding in findings)


def examine() -> Report:
    """Look at the machine and the build; nothing is downloaded, built or written."""
    parts = {
        "machine": machine,
        "packages": packages,
        "compiled core": core,
        "operations": operations,
        "weights": weights,
    }
    return Report({title: list(part()) for title, part in parts.items()})


def machine() -> Iterator[Finding]:
    """Processor, memory, GPU."""
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("processor", f"{_processor()}, {_cores()} cores for this process")
    if not importlib.util.find_spec("torch"):
        return
    import torch

    yield Finding("threads", f"{torch.get_num_threads()} used by torch")
    yield Finding("instructions", f"torch {torch.backends.cpu.get_cpu_capability()}; {_wide_instructions()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}"
            yield Finding(f"cuda:{index}", text)
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Finding("gpu", f"none ({built})", "note")


def packages() -> Iterator[Finding]:
    """Python packages, required and optional."""
    for distribution, module, purpose, extra in PACKAGES:
        if importlib.util.find_spec(module) is None:
            remedy = f"pip install -e '.[{extra}]'" if extra else INSTALL
            yield Finding(distribution, f"absent; for {purpose}", "note" if extra else "missing", remedy)
            continue
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found = "present"
        yield Finding(distribution, f"{found}; for {purpose}")


def core() -> Iterator[Finding]:
    """The extension cfengine._C, or why it is not there."""
    try:
        from cfengine import _C
    except ImportError as error:
        tools = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
        lacking = "" if tools else "no C++ compiler was found (Debian, Ubuntu: apt install g++ python3-dev); then "
        text = f"not built ({error}); plain torch serves every operation, slower"
        yield Finding("cfengine._C", text, "note", f"{lacking}{INSTALL}")
        return
    yield Finding("cfengine._C", str(Path(_C.__file__)))
    yield Finding("instruction set", f"{_C.isa()} in force; built and usable here: {', '.join(_C.isas())}")
    if not _C.threaded:
        yield Finding("threads", "built without OpenMP, one thread", "note", f"add libgomp, then {INSTALL}")


def operations() -> Iterator[Finding]:
    """Which implementation serves each operation, per device."""
    try:
        import torch

        from cfengine import ops
    except ImportError as error:
        yield Finding("operations", f"cannot be examined ({error})", "missing", INSTALL)
        return
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op, candidates in ops.choices(device).items():
            serving = next((name for name, available, _ in candidates if available), None)
            others = [f"{name}: {reason}" for name, available, reason in candidates if not available]
            also = [name for name, available, _ in candidates if available and name != serving]
            text = serving or "nothing"
            if also:
                text += f" (also: {', '.join(also)})"
            if others:
                text += "; unavailable " + "; ".join(others)
            yield Finding(f"{op} on {device}", text, "ok" if serving else "missing", "" if serving else INSTALL)


def weights() -> Iterator[Finding]:
    """Weights on this machine, and the folder for caches."""
    shipped = Path(__file__).parent / "weights" / DEFAULT_PRESET
    files = [shipped / f"{part}.safetensors" for part in ("dit", "codec", "text")]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        remedy = f"clone the repository again, or train them: python -m cfengine.training train --out {shipped}"
        yield Finding(DEFAULT_PRESET, f"no {', '.join(absent)} in {shipped}", "missing", remedy)
    else:
        size = sum(file.stat().st_size for file in files) / 1e6
        yield Finding(DEFAULT_PRESET, f"{len(files)} files, {size:.1f} MB in {shipped}")
    for source in dict.fromkeys(s for c in PRESETS.values() for s in (c.dit_source, c.base_source) if s):
        yield _hub_finding(source)
    cache = cache_dir()
    place = cache if cache.exists() else next(parent for parent in cache.parents if parent.exists())
    if os.access(place, os.W_OK):
        yield Finding("cache", f"{cache}" if cache.exists() else f"{cache} (made at first use)")
    else:
        yield Finding(
            "cache", f"{cache} cannot be written", "note", "set CFENGINE_CACHE_DIR to a folder you may write to"
        )


def _hub_finding(source: str) -> Finding:
    if importlib.util.find_spec("huggingface_hub") is None:
        return Finding(source, "unknown, huggingface_hub is absent", "note", INSTALL)
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / ("models--" + source.replace("/", "--"))
    if folder.is_dir():
        return Finding(source, f"in {folder}")
    return Finding(source, "not downloaded; fetched when a preset first asks for it", "note")


def _processor() -> str:
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _wide_instructions() -> str:
    """Instruction sets that the kernels can use, as the processor reports them."""
    flags: set[str] = set()
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    found = [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve") if flag in flags]
    return ", ".join(found) or "no vector instructions reported"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def render(report: Report) -> None:
    """Print a report on standard output; wide lines are left whole where it is not a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for title, findings in report.sections.items():
        console.print(Text(title, style="bold"))
        width = max((len(finding.name) for finding in findings), default=0)
        for finding in findings:
            colour, mark = MARKS[finding.state]
            line = (
                Text("  ").append(f"{mark:<8}", style=colour).append(f"{finding.name:<{width}}  ").append(finding.text)
            )
            console.print(line, soft_wrap=True)
            if finding.remedy:
                console.print(Text(f"{'':<10}{'':<{width}}  add it: {finding.remedy}", style="cyan"), soft_wrap=True)
    verdict = "ready: cfengine generate works" if report.healthy else "cfengine generate cannot work yet; see above"
    console.print(Text(verdict, style="green" if report.healthy else "red"))
