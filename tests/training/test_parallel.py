"""Two processes that a launcher started: the same weights on both, and those of one process with the mean gradient."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cfengine.config import ModelConfig
from cfengine.errors import ConfigError, DeviceError
from cfengine.training import parallel
from cfengine.training.settings import Descent
from cfengine.training.state import Progress, World

pytestmark = pytest.mark.cpu

SHARED = """
import sys, torch
from cfengine.training.settings import Descent
from cfengine.training.state import Progress
sys.path.insert(0, sys.argv[2])
from steps import new, loss
"""
RANK = (
    SHARED
    + """
from cfengine.training.parallel import in_processes, joined, rank, size, wait
def work():
    torch.set_num_threads(1)
    progress = new()
    for step in range(3):
        loss(progress.world, step, rank()).backward()
        progress.advance()
    torch.save(progress.world.state_dict(), f"{sys.argv[1]}/{rank()}.pt")
with joined("cpu"):
    assert size() == 2
    in_processes(2, "cpu", work)
    wait()
"""
)
STEPS = """
import torch
from cfengine.config import ModelConfig
from cfengine.training.settings import Descent
from cfengine.training.state import Progress, World

def new():
    torch.manual_seed(0)
    model = ModelConfig(dim=24, ffn_dim=48, heads=2, layers=1, text_dim=8, text_len=6, freq_dim=16)
    return Progress(World(model), Descent(10, 1e-2, 1))

def loss(world, step, rank):
    draw = torch.Generator().manual_seed(10 * step + rank)
    rows = torch.randn(3, 24, generator=draw)
    block = world.dit.blocks[0]  # embeddings, head and table have no gradient in either process
    return block.ffn(block.self_attn.q(rows)).square().mean()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_processes_are_one_with_the_mean_gradient(tmp_path) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "rank.py").write_text(RANK)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path), str(tmp_path)]
    started = [subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    found: dict = {}
    exec(STEPS, found)
    progress = found["new"]()
    begun = {name: value.clone() for name, value in progress.world.state_dict().items()}
    for step in range(3):
        ((found["loss"](progress.world, step, 0) + found["loss"](progress.world, step, 1)) / 2).backward()
        for p in progress.world.parameters():  # as average_gradients leaves them
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        progress.advance()
    for name, value in progress.world.state_dict().items():
        assert torch.equal(both[0][name], both[1][name])
        # gradients are added in another order; Muon rounds to bfloat16, so a step of 1e-2 may differ by 2^-8 of itself
        torch.testing.assert_close(both[0][name], value, atol=3 * 1e-2 * 2**-8, rtol=0)
    moved = both[0]["dit.blocks.0.ffn.0.weight"] - begun["dit.blocks.0.ffn.0.weight"]
    assert moved.abs().max() > 1e-3


def test_gradients_are_averaged_in_buckets(monkeypatch) -> None:
    monkeypatch.setattr(parallel, "BUCKET", 10)
    sizes = [4, 5, 3, 30, 1]
    held = parallel.buckets(torch.nn.Parameter(torch.zeros(size)) for size in sizes)
    assert [[p.numel() for p in bucket] for bucket in held] == [[4, 5], [3], [30], [1]]


def test_one_process_stays_here(monkeypatch) -> None:
    called = []
    parallel.in_processes(1, "cpu", called.append, 3)
    assert called == [3] and parallel.size() == 1 and parallel.rank() == 0
    progress = Progress(World(ModelConfig(dim=24, ffn_dim=48, heads=2, layers=1, text_dim=8)), Descent(2, 1e-3, 1))
    progress.advance()  # nothing has a gradient, and nobody has to be asked for one
    assert progress.step == 1


def test_devices_that_are_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="torch sees no CUDA device"):
        parallel.check_devices("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="2 processes need a CUDA device each and there are 1"):
        parallel.check_devices("cuda", 2)
    with pytest.raises(ConfigError, match="processes is 0"):
        parallel.check_devices("cpu", 0)


WORKERS = """
import os, sys, time
from pathlib import Path
from cfengine.training.parallel import in_processes
def work(folder):
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(300)
if __name__ == "__main__":
    in_processes(2, "cpu", work, sys.argv[1])
"""


def test_processes_end_with_the_one_that_started_them(tmp_path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    parent = subprocess.Popen([sys.executable, tmp_path / "workers.py", tmp_path])
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 120)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    try:
        wait_until(lambda: not any(map(alive, pids)), 30)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for a parent to ask does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
