"""TensorRT and TensorRT-RTX behind one door: the module by name, its GPU, and a log that is kept instead of printed."""

from __future__ import annotations

import importlib
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

from cfengine.errors import ConfigError

# Module -> how to get it. Their Python interfaces agree in everything that is used here.
LIBRARIES = {
    "tensorrt_rtx": "pip install 'cfengine[tensorrt]' (TensorRT-RTX: RTX GPUs, builds without a GPU)",
    "tensorrt": "pip install tensorrt (NVIDIA's index; any data-centre GPU, builds for the GPU at hand)",
}


def library(name: str) -> ModuleType:
    """Import `tensorrt_rtx` or `tensorrt`; ConfigError says how to get what is missing."""
    if name not in LIBRARIES:
        raise ConfigError(f"unknown library {name!r}; choose one of {', '.join(LIBRARIES)}")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: the package is there and a library that it loads is not
        raise ConfigError(f"{name} cannot be imported ({error}); {LIBRARIES[name]}") from error


def installed() -> list[str]:
    """Names of the libraries that import, TensorRT-RTX first."""
    found = []
    for name in LIBRARIES:
        try:
            library(name)
        except ConfigError:
            continue
        found.append(name)
    return found


def on_gpu(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is CUDA's current one, which is where TensorRT builds, loads and runs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def gpu_library(device: torch.device | str | None = None) -> tuple[str, str]:
    """Library for a GPU, TensorRT where it is installed and else TensorRT-RTX, and the GPU's compute capability.

    device: CUDA's current one where not given
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} finds no GPU to build for; use --target rtx, which builds ahead of time, "
            "without one"
        )
    found = installed()
    if not found:
        raise ConfigError(f"neither TensorRT nor TensorRT-RTX is installed; {' or '.join(LIBRARIES.values())}")
    return found[-1], ".".join(map(str, torch.cuda.get_device_capability(device)))


def kept_log(trt: ModuleType, most: int | None = None) -> Any:
    """A logger for `trt` that keeps what it is told, or the last `most` lines and errors of it.

    lines: (severity name, text)      errors: texts of the worst, which no number of other lines drives out
    """

    class KeptLog(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[tuple[str, str]] = deque(maxlen=most)
            self.errors: deque[str] = deque(maxlen=most)

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity.name, message))
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)

    return KeptLog()
