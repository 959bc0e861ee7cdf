"""Training in several processes: every process takes its own batches, gradients are averaged once a step.

On a CPU there is one process a core: the model is small, so two threads inside an operation spend their time waiting
for each other, and two processes meet once a step. On GPUs there is one process a device. Random numbers are functions
of (seed, step, rank), so a resumed run draws what an unbroken one would.

Gradients are averaged here and not by DistributedDataParallel: a step of the student has several backward passes
through calls that are not `forward`, of which some leave parameters without a gradient, and DDP would average each of
them for itself.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cfengine.config import launched
from cfengine.errors import ConfigError, DeviceError

PATIENCE = timedelta(hours=24)  # how long processes wait for the one that makes codec and strips
BUCKET = 2**25  # numbers that are averaged in one call: a buffer of 128 MiB


def rank() -> int:
    """Number of this process; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Let all processes come here."""
    if dist.is_initialized():
        dist.barrier()


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, together while they have no more than BUCKET numbers."""
    held: list[nn.Parameter] = []
    for p in parameters:
        if held and sum(q.numel() for q in held) + p.numel() > BUCKET:
            yield held
            held = []
        held.append(p)
    if held:
        yield held


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes; parameters without one count as zero."""
    if not dist.is_initialized():
        return
    for held in buckets(parameters):
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in held])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, grad in zip(held, flat.split([p.numel() for p in held]), strict=True):
            p.grad = grad.view_as(p)


def draws(seed: int, step: int) -> tuple[np.random.Generator, np.random.Generator]:
    """(common, own): random numbers that all processes share at a step, and this one's, which seeds torch."""
    own = np.random.default_rng([seed, step, 1 + rank()])
    torch.manual_seed(int(own.integers(2**62)))
    return np.random.default_rng([seed, step]), own


def check_devices(device: str, processes: int) -> None:
    """Raise where `processes` processes cannot have a device each."""
    if processes < 1:
        raise ConfigError(f"processes is {processes}; it must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda was asked for and torch sees no CUDA device; choose --device cpu")
    if device == "cuda" and processes > torch.cuda.device_count():
        raise DeviceError(
            f"{processes} processes need a CUDA device each and there are {torch.cuda.device_count()}; "
            "choose fewer --processes"
        )


def own_device(device: str) -> torch.device:
    """The device of this process: "cpu", or the GPU of its number on this machine."""
    if device != "cuda":
        return torch.device(device)
    here = dist.get_node_local_rank(fallback_rank=rank()) if dist.is_initialized() else 0
    return torch.device("cuda", here)


@contextmanager
def joined(device: str, **how: Any) -> Iterator[None]:
    """Be one of several processes: those of `how`, or those that a launcher such as torchrun started."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE, **how)
    try:
        if device == "cuda":
            torch.cuda.set_device(own_device(device))
        yield
    finally:
        dist.destroy_process_group()


def end_with_parent() -> None:
    """End this process when the one that started it is gone: it would go on and write over what is begun anew."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    if parent_process() is not None:
        threading.Thread(target=watch, daemon=True).start()


def _enter(number: int, processes: int, store: str, device: str, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    end_with_parent()
    with joined(device, init_method=f"file://{store}", rank=number, world_size=processes):
        work(*arguments)


def in_processes(processes: int, device: str, work: Callable[..., Any], *arguments: Any) -> None:
    """Run `work(*arguments)` in `processes` new processes, and wait for all of them.

    It runs here where one is enough, and where a launcher started this process as one of several.
    """
    if processes == 1 or launched():
        work(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(_enter, (processes, store, device, work, arguments), nprocs=processes)
