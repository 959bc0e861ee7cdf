"""TensorRT and TensorRT-RTX behind one door: the module by name, and a log that is kept instead of printed."""

from __future__ import annotations

import importlib
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


def gpu_library() -> tuple[str, str]:
    """Library for the GPU at hand, TensorRT where it is installed and else TensorRT-RTX, and its compute capability."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} finds no GPU to build for; use --target rtx, which builds ahead of time, "
            "without one"
        )
    found = installed()
    if not found:
        raise ConfigError(f"neither TensorRT nor TensorRT-RTX is installed; {' or '.join(LIBRARIES.values())}")
    return found[-1], ".".join(map(str, torch.cuda.get_device_capability()))


def kept_log(trt: ModuleType) -> Any:
    """A logger for `trt` that keeps what it is told.  lines: (severity name, text)      errors: texts of the worst"""

    class KeptLog(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity.name, message))

        @property
        def errors(self) -> list[str]:
            return [text for name, text in self.lines if name in ("ERROR", "INTERNAL_ERROR")]

    return KeptLog()
