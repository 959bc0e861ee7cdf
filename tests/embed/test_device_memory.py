"""Frames in device memory, with a stand-in for it: the socket, the handle, and every pixel in another process."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cfengine.embed import Format, Memory, Reader, Ring
from cfengine.embed import device as device_module
from cfengine.embed import handles as handles_module
from cfengine.embed.device import convert, planes_in
from cfengine.errors import RingError
from tests.embed.sample_tools import Program
from tests.embed.standin import MemfdMemory, comes_back_to, descriptors, picture, publish

pytestmark = [pytest.mark.embed, pytest.mark.usefixtures("standin")]

WIDTH, HEIGHT = 70, 46  # rows of 280 bytes: not as wide as their stride
FORMATS = [Format.RGBA8, Format.NV12]


def kill(client: Program) -> None:
    client.kill()
    client.__exit__()
    for pipe in (client.process.stdin, client.process.stdout):
        pipe.close()


# Pixels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_program_reads_every_pixel(ring_name, program, format):
    with Ring(ring_name, WIDTH, HEIGHT, format=format, slots=64, memory="opaque_fd") as ring:
        publish(ring, 40)
        said = program("read", ring_name, 40, 1).end()
    assert said == ["writer 1 imported", "writer 1 read 40"]


def test_two_programs_read_at_once(ring, program):
    both = [program("read", ring.name, 50, 1) for _ in range(2)]
    for id in range(1, 51):
        publish(ring, 1, id)
    for one in both:
        assert one.end()[-1] == "writer 1 read 50"


@pytest.mark.parametrize("format", FORMATS)
def test_a_reader_in_python_maps_it(ring_name, format):
    with Ring(ring_name, WIDTH, HEIGHT, format=format, memory="opaque_fd") as ring, Reader(ring_name) as reader:
        publish(ring, 3)
        assert reader.state().memory is ring.memory is Memory.OPAQUE_FD
        with reader.acquire() as frame, reader.device_memory() as handle:
            assert frame.planes == () and handle.generation == frame.generation == ring.generation
            with pytest.raises(RingError, match="frame 3 is in device memory .opaque_fd."):
                frame.pixels  # noqa: B018
            whole = torch.frombuffer(mmap.mmap(handle.fd, handle.size), dtype=torch.uint8)
            found, expected = frame.planes_in(whole), host_planes(format, picture(3, WIDTH, HEIGHT))
            assert all(np.array_equal(one.numpy(), two) for one, two in zip(found, expected, strict=True))
            assert handle.slots == 24 and handle.slots * handle.frame_stride <= handle.size == len(
                ring._device.memory.bytes()
            )
        assert handle.fd == -1


def host_planes(format: Format, pixels: torch.Tensor) -> tuple[np.ndarray, ...]:
    """What csrc/client/convert.c makes of pixels."""
    with Ring(f"test-{os.getpid()}-host", WIDTH, HEIGHT, format=format) as ring, Reader(ring.name) as reader:
        ring.publish(pixels.numpy())
        with reader.acquire() as frame:
            return tuple(plane.copy() for plane in frame.planes)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("channels", [3, 4])
def test_conversion_is_that_of_the_host_bit_for_bit(format, channels):
    pixels = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, channels), np.uint8))
    for given in (pixels, pixels.flip(0), pixels.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        memory = torch.full((4 * 320 * HEIGHT,), 7, dtype=torch.uint8)
        planes = planes_in(memory, format, WIDTH, HEIGHT, (320, 320 * HEIGHT + 640), (320, 320))
        convert(given, planes)
        expected = host_planes(format, given.contiguous())
        assert all(np.array_equal(one.numpy(), two) for one, two in zip(planes, expected, strict=True))
        written = sum(plane.numel() for plane in planes)
        memory.zero_()
        for plane in planes:
            plane.fill_(1)
        assert int(memory.sum()) == written, "planes lie apart, and hold nothing else"


def test_a_frame_is_shown_after_the_device_is_done_with_it(ring):
    seen, memory = [], ring._device.memory
    with Reader(ring.name) as reader:
        memory.wait = lambda: seen.append(reader.state().newest_id)
        publish(ring, 2)
        assert seen == [0, 1] and reader.state().newest_id == 2


def test_a_copy_that_fails_is_shown_to_nobody(ring):
    def fail() -> None:
        raise RuntimeError("the GPU is lost")

    memory = ring._device.memory
    with Reader(ring.name) as reader:
        for id in range(1, 100):  # more than there are slots
            memory.wait, wait = fail, memory.wait
            with pytest.raises(RuntimeError, match="lost"):
                ring.publish(picture(9, WIDTH, HEIGHT))
            memory.wait = wait
            assert reader.state().newest_id == id - 1
            publish(ring, 1, id)


def test_words_about_a_frame_that_make_no_sense_leave_the_slot_free(ring):
    with pytest.raises(TypeError):
        ring.publish(picture(1, WIDTH, HEIGHT), chunk=-1)
    assert ring.publish(picture(1, WIDTH, HEIGHT)) == 1


def test_what_a_failed_copy_has_queued_is_waited_for(ring, monkeypatch):
    """Before the slot is anybody else's: kernels may still be writing it."""

    def half(*given) -> None:
        raise MemoryError

    log = ring._device.memory.log
    monkeypatch.setattr(device_module, "convert", half)
    log.clear()
    with pytest.raises(MemoryError):
        ring.publish(picture(1, WIDTH, HEIGHT))
    assert log == ["wait"]


def test_a_held_frame_stays(ring_name, program):
    with Ring(ring_name, WIDTH, HEIGHT, slots=6, memory="opaque_fd") as ring, Reader(ring_name, lease=60) as reader:
        publish(ring, 1)
        with reader.acquire() as frame:
            plane = frame.planes_in(ring._device.memory.bytes())[0]
            publish(ring, 20, 2)
            assert torch.equal(plane[..., :3], picture(1, WIDTH, HEIGHT))
        publish(ring, 20, 22)
        assert not torch.equal(plane[..., :3], picture(1, WIDTH, HEIGHT))


def test_frames_that_are_elsewhere_or_of_another_size(ring, ring_name):
    with pytest.raises(RingError, match="a ndarray in host memory, but its frames are on cpu"):
        ring.publish(picture(1, WIDTH, HEIGHT).numpy())
    with pytest.raises(RingError, match="frame on meta, but its frames are on cpu"):
        ring.publish(torch.empty(HEIGHT, WIDTH, 3, dtype=torch.uint8, device="meta"))
    for wrong in (picture(1, WIDTH, HEIGHT - 1), picture(1, WIDTH, HEIGHT).float(), picture(1, WIDTH, HEIGHT)[..., :2]):
        with pytest.raises(RingError, match=rf"give \({HEIGHT}, {WIDTH}, 3 or 4\) uint8"):
            ring.publish(wrong)
    with pytest.raises(RingError, match="unknown memory 'vulkan'; choose one of host, cuda_ipc, opaque_fd"):
        Ring(f"{ring_name}-b", WIDTH, HEIGHT, memory="vulkan")
    with Ring(f"{ring_name}-b", WIDTH, HEIGHT) as host:
        with pytest.raises(RingError, match="frame on meta, but its frames are in host memory"):
            host.publish(torch.empty(HEIGHT, WIDTH, 3, dtype=torch.uint8, device="meta"))
        host.publish(picture(1, WIDTH, HEIGHT))  # a tensor of the host is as good as an array


# Writers and clients that end -----------------------------------------------------------------------------------------


def test_a_writer_is_killed_and_another_begins(ring_name, program):
    """The program learns from the generation that it has to import again; what it maps of the dead stays readable."""
    command = [sys.executable, Path(__file__).parent / "standin.py", ring_name]
    with Program(*command, "30") as first:
        first.wait_for("published")
        reader = program("read", ring_name, 30, 2)
        reader.wait_for("writer 1 read 30")
        first.kill()
    with Program(*command, "30", "RGBA8") as second:
        second.wait_for("published")
        assert reader.end()[-2:] == ["writer 2 imported", "writer 2 read 30"]


def test_a_client_that_is_killed_harms_nobody(ring, program):
    publish(ring, 1)
    before = descriptors()
    for _ in range(5):  # more than there are places for readers
        client = program("hold", ring.name)
        client.wait_for("held")
        kill(client)
    publish(ring, 200, 2)
    assert ring.stats().refused == 0 and ring.stats().published == 201
    with Reader(ring.name) as reader:
        reader.device_memory().close()
    assert comes_back_to(before)


def test_a_closed_ring_leaves_nothing(ring_name, standin):
    def files() -> list[Path]:
        return sorted(standin.rglob("*"))

    with Ring(f"{ring_name}-warm", WIDTH, HEIGHT, memory="opaque_fd"):
        pass
    threads, before = threading.active_count(), descriptors()
    for _ in range(3):
        with Ring(ring_name, WIDTH, HEIGHT, memory="opaque_fd") as ring, Reader(ring_name) as reader:
            publish(ring, 1)
            assert [path.name for path in files()[1:]] == ["handles"] and files()[0].stat().st_mode & 0o777 == 0o700
            reader.device_memory().close()
            ring.close()
            ring.close()
            with pytest.raises(RingError, match="the ring is closed"):
                publish(ring, 1)
            with pytest.raises(RingError, match="nobody listens") as raised:
                reader.device_memory()
            assert raised.value.result == "CF_ERROR_NOT_FOUND"
            memory = ring._device.memory
        assert (threading.active_count(), descriptors(), files()) == (threads, before, []) and memory.fd is None


def test_a_ring_that_cannot_be_made_gives_everything_back(ring, standin, monkeypatch):
    made: list[MemfdMemory] = []

    def allocate(*arguments):
        made.append(MemfdMemory(*arguments))
        return made[-1]

    monkeypatch.setattr(device_module, "allocate", allocate)
    threads, before, files = threading.active_count(), descriptors(), sorted(standin.rglob("*"))
    with pytest.raises(RingError, match="living writer") as raised:
        Ring(ring.name, WIDTH, HEIGHT, memory="opaque_fd")
    assert raised.value.result == "CF_ERROR_BUSY" and made[0].log[-1] == "close"
    with pytest.raises(RingError, match="slots is 3"):
        Ring(f"{ring.name}-b", WIDTH, HEIGHT, slots=3, memory="opaque_fd")
    assert len(made) == 1, "sizes are checked before memory is allocated"
    with monkeypatch.context() as patch, pytest.raises(RingError, match="no folder"):
        patch.setattr(handles_module, "PATH_BYTES", 5)
        Ring(f"{ring.name}-b", WIDTH, HEIGHT, memory="opaque_fd")
    assert made[1].log[-1] == "close"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lost"):
        patch.setattr(MemfdMemory, "wait", lambda self: (_ for _ in ()).throw(RuntimeError("lost")))
        Ring(f"{ring.name}-b", WIDTH, HEIGHT, memory="opaque_fd")
    assert made[2].log[-1] == "close"
    assert (threading.active_count(), descriptors(), sorted(standin.rglob("*"))) == (threads, before, files)


def test_a_forked_child_leaves_the_socket_alone(ring_name):
    code = f"""
import os
from cfengine.embed import Reader, Ring
from tests.embed import standin
standin.use()
ring = Ring({ring_name!r}, 8, 8, memory="opaque_fd")
if os.fork() == 0:
    ring.close()
    os._exit(0)
assert os.wait()[1] == 0
with Reader(ring.name) as reader, reader.device_memory() as handle:
    assert handle.fd >= 0
ring.close()
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_does_not_listen_for_its_parent(ring_name):
    code = f"""
import os, signal
from cfengine.embed import Ring
from tests.embed import standin
standin.use()
ring = Ring({ring_name!r}, 8, 8, memory="opaque_fd")
ring.publish(standin.picture(1, 8, 8))
if os.fork() == 0:
    print("forked", os.getpid(), flush=True)
signal.pause()
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as writer:
        child = int(writer.stdout.readline().split()[1])
        with Reader(ring_name) as reader:
            reader.device_memory().close()
            writer.kill()
            writer.wait()
            os.kill(child, 0)  # it lives
            with pytest.raises(RingError) as caught:
                reader.device_memory()
            os.kill(child, signal.SIGKILL)
    Ring.unlink(ring_name)
    assert caught.value.result == "CF_ERROR_NOT_FOUND"
