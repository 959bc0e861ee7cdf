"""What a GPU can refuse: too old, without a fitting driver, too full, lost. Every refusal is one DeviceError."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cfengine.config import EngineConfig
from cfengine.errors import ConfigError, DeviceError, KernelError

LEAST_CAPABILITY = (8, 0)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# torch, Triton, libraries, and (CUDA says) the compiled extension each have words of their own
_FULL = re.compile(
    r"(CUDA (driver )?error|Triton Error \[CUDA\]): out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    r"|CUDA says cudaErrorMemoryAllocation|DefaultCPUAllocator: (can't allocate|not enough) memory"
)
_NOT_BUILT = re.compile(r"no kernel image|unsupported toolchain|driver version is insufficient")
_LOST = re.compile(r"CUDA (driver )?error|(CUBLAS|CUDNN)_STATUS_(?!NOT_SUPPORTED)|Triton Error \[CUDA\]|CUDA says")


def check_device(device: torch.device | str) -> None:
    """Raise ConfigError where torch has no CUDA, DeviceError where driver or GPU do not serve it."""
    device = torch.device(device)
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            raise ConfigError(
                f"device '{device}' needs CUDA, which torch {torch.__version__} does not find; use device='cpu'"
            )
        raise DeviceError(
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no GPU that it can use "
            f"({_reason()}); update the NVIDIA driver, install a torch build for the driver's CUDA, or use device='cpu'"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise DeviceError(f"device '{device}' is asked for but this machine has {count} GPUs, counted from 0")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        has, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)} ('{device}') has compute capability {has} and the kernels need "
            f"{least} (Ampere) or later; choose another GPU, or device='cpu'"
        )


def _reason() -> str:
    """Why CUDA does not start, in torch's words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0].rstrip(".")
    return "no GPU is visible"


def check_fits(what: str, needed: int, config: EngineConfig, device: torch.device | str, itemsize: int = 2) -> None:
    """Raise DeviceError unless `needed` bytes are free on the device, memory that torch keeps for itself included.

    itemsize: bytes of a number in pages that are not fp8
    """
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - held
    if needed > free:
        raise DeviceError(
            f"{what} needs {_size(needed)} and '{torch.device(device)}' has {_size(free)} free of {_size(total)}, of "
            f"which this process holds {_size(held)}; close other engines or programs on this GPU, or save "
            f"{_size(needed - free)}: {remedies(config, needed - free, itemsize)}"
        )


def slot_bytes(config: EngineConfig, itemsize: int = 2) -> int:
    """Size of the keys and values of one latent frame in all layers."""
    size = 1 if config.precision.pages == "fp8" else itemsize
    return 2 * config.model.layers * config.page_tokens * config.model.dim * size


def page_bytes(config: EngineConfig, itemsize: int = 2) -> int:
    """Size of the pages of a session, scales aside."""
    return (config.memory.slots + config.memory.chunk_frames + 1) * slot_bytes(config, itemsize)


def remedies(config: EngineConfig, short: int, itemsize: int = 2) -> str:
    """What to lower, and by how much, to save `short` bytes."""
    each, pages = slot_bytes(config, itemsize), page_bytes(config, itemsize)
    found = []
    slots = math.ceil(short / each)
    if slots <= config.memory.slots - config.memory.kept_sink - config.memory.chunk_frames:
        left = config.memory.slots - slots
        found.append(f"{left} slots, not {config.memory.slots} (MemoryConfig.slow or .fast; {_size(each)} a slot)")
    if config.precision.pages != "fp8":
        found.append(f"pages in fp8 (PrecisionConfig.pages; saves {_size(pages - pages // itemsize)})")
    if short < 0.9 * pages:
        side = math.sqrt(1 - short / pages)
        video = config.video
        found.append(f"a picture of {side * video.width:.0f}x{side * video.height:.0f} or less (VideoConfig)")
    return ", or ".join(found) if found else "a GPU with more memory is needed"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


@contextmanager
def device_errors(config: EngineConfig, device: torch.device | str | None, itemsize: int = 2) -> Iterator[None]:
    """Turn what is raised of a GPU that is full, lost or not built for into a DeviceError; other errors pass.

    A CPU can be full, and no more than that.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _full(str(error), config, device, itemsize) from error
    except (RuntimeError, KernelError) as error:
        if _FULL.search(str(error)):
            raise _full(str(error), config, device, itemsize) from error
        if not _LOST.search(str(error)):
            raise
        first = str(error).split("\n")[0].rstrip(".")
        if _NOT_BUILT.search(first):
            has = ".".join(map(str, torch.cuda.get_device_capability(device)))
            raise DeviceError(
                f"what runs on '{device}' is not built for its compute capability {has} and its driver ({first}); "
                "update the NVIDIA driver, install a torch build for this GPU, or build the extension on this machine: "
                "pip install -e ."
            ) from error
        raise DeviceError(
            f"the GPU '{device}' failed ({first}); sessions on it are closed and the frames that they gave stay good, "
            "but this process cannot use the GPU any more: start a new one"
        ) from error


def _full(words: str, config: EngineConfig, device: torch.device | str | None, itemsize: int) -> DeviceError:
    match = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", words)
    asked = round(float(match.group(1)) * _UNITS[match.group(2)]) if match else slot_bytes(config, itemsize)
    if torch.device(device or "cpu").type == "cpu":
        return DeviceError(
            f"this machine is out of memory: {_size(asked)} were asked for; close other engines or programs, or save "
            f"{_size(asked)}: {remedies(config, asked, itemsize)}"
        )
    free = torch.cuda.mem_get_info(device)[0]
    short = max(asked - free, 0) or asked  # free memory in pieces that are too small counts as none
    return DeviceError(
        f"'{device}' is out of memory: {_size(asked)} were asked for and {_size(free)} are free; close other engines "
        f"or programs on this GPU, or save {_size(short)}: {remedies(config, short, itemsize)}"
    )
