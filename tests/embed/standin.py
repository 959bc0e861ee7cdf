"""A GPU's memory played by a file in memory, which any process maps by its descriptor, and frames that say their ids.

python standin.py NAME FRAMES [FORMAT]    a writer: publishes so many frames, says "published", waits for its end
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from contextlib import suppress

import torch
from torch import Tensor

from cfengine.embed import Format, Memory, Reader, Ring
from cfengine.embed import device as device_module
from cfengine.errors import RingError

UNIT = 2 << 20


class MemfdMemory:
    """See `DeviceMemory`; `log` has what was asked of it."""

    uuid = b"stand-in device!"

    def __init__(self, kind: Memory, size: int, device: torch.device | str) -> None:
        self.kind, self.size, self.device = kind, -(-size // UNIT) * UNIT, torch.device("cpu")
        self.fd: int | None = os.memfd_create("cfengine-test")
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)
        self.ipc_handle = bytes(64)
        self.log: list[str] = []

    def bytes(self) -> Tensor:
        return torch.frombuffer(self._map, dtype=torch.uint8)

    def wait(self) -> None:
        self.log.append("wait")

    def close(self) -> None:
        self.log.append("close")
        if self.fd is not None:
            os.close(self.fd)
        self.fd = self._map = None


def use() -> None:
    """Let rings of this process, from now on, have such memory."""
    device_module.allocate = MemfdMemory


def reader_beside(writer: threading.Thread, name: str) -> Reader:
    """A reader of the ring that a thread is about to make."""
    while True:
        assert writer.is_alive()
        with suppress(RingError):
            return Reader(name)


def picture(id: int, width: int, height: int) -> Tensor:
    """(height, width, 3) uint8; device.c has the same."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack([5 * x + 3 * id, 7 * y + id, x ^ y ^ id], -1) % 256).to(torch.uint8)


def publish(ring: Ring, count: int, first: int = 1) -> None:
    for id in range(first, first + count):
        assert ring.publish(picture(id, ring.width, ring.height)) == id


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def comes_back_to(count: int) -> bool:
    """Whether this process has so many descriptors again, once the last client that was answered is hung up on."""
    until = time.monotonic() + 20
    while descriptors() != count and time.monotonic() < until:
        pass
    return descriptors() == count


def main(name: str, frames: str, format: str = "RGBA8") -> None:
    use()
    with Ring(name, 70, 46, format=Format[format], slots=64, memory="opaque_fd") as ring:
        for id in range(1, int(frames) + 1):
            ring.publish(picture(id, ring.width, ring.height))
        sys.stdout.write("published\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
