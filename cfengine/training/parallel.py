"""Training in one process per core: every process takes its own batches, gradients are averaged once a step.

The model is small, so two threads inside an operation spend their time waiting for each other; two processes meet once
a step. Random numbers are functions of (seed, step, rank), so a resumed run draws what an unbroken one would.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


def rank() -> int:
    """Number of this process; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes; parameters without one count as zero."""
    if not dist.is_initialized():
        return
    parameters = list(parameters)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def draws(seed: int, step: int) -> tuple[np.random.Generator, np.random.Generator]:
    """(common, own): random numbers that all processes share at a step, and this one's, which seeds torch."""
    own = np.random.default_rng([seed, step, 1 + rank()])
    torch.manual_seed(int(own.integers(2**62)))
    return np.random.default_rng([seed, step]), own


def _enter(number: int, processes: int, store: str, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=processes)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()


def in_processes(processes: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Run `work(*arguments)` in `processes` new processes of one thread each, and wait for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (processes, str(Path(folder) / "store"), work, arguments), nprocs=processes)
