"""Frames in device memory, with a stand-in for it: the socket, the handle, and every pixel in another process."""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from cfengine.embed import Flags, Format, Memory, Policy, Reader, Ring
from cfengine.embed import device as device_module
from cfengine.embed import handles as handles_module
from cfengine.embed.device import convert, planes_in
from cfengine.embed.handles import PACKET, HandleServer, packet
from cfengine.embed.native import load
from cfengine.errors import RingError
from tests.embed.sample_tools import Program
from tests.embed.standin import MemfdMemory, picture

pytestmark = pytest.mark.embed

WIDTH, HEIGHT = 70, 46  # rows of 280 bytes: not as wide as their stride
FORMATS = [Format.RGBA8, Format.NV12]


@pytest.fixture(autouse=True)
def standin(monkeypatch):
    """Rings get the stand-in's memory, and sockets a folder of this test, with a path that is short everywhere."""
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.setattr(device_module, "allocate", MemfdMemory)
        yield Path(folder)


@pytest.fixture
def ring(ring_name):
    with Ring(ring_name, WIDTH, HEIGHT, slots=64, memory="opaque_fd") as made:
        yield made


@pytest.fixture
def program(programs):
    """start(words...) -> tests/embed/device.c, under AddressSanitizer."""
    started = []

    def start(*words: object) -> Program:
        started.append(Program(programs.path("device", "address"), *map(str, words)))
        return started[-1]

    yield start
    for one in started:
        with suppress(ValueError):  # one whose pipes are closed
            one.__exit__()


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


# The socket -----------------------------------------------------------------------------------------------------------


def test_the_socket_of_a_killed_writer_is_swept_away(ring_name, standin):
    command = [sys.executable, Path(__file__).parent / "standin.py", f"{ring_name}-dead", "1"]
    with Program(*command) as writer:
        writer.wait_for("published")
        writer.kill()
    Ring.unlink(f"{ring_name}-dead")
    assert len(list(standin.iterdir())) == 1
    alive = HandleServer()
    made = HandleServer()
    assert {str(path) for path in standin.rglob("handles")} == {alive.path, made.path}
    for server in (alive, made):
        server.close()
    assert not list(standin.iterdir())


def test_a_folder_that_is_too_long_or_missing_is_passed_by(monkeypatch, tmp_path):
    for place in (tmp_path / ("x" * 90), tmp_path / "missing"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
        server = HandleServer()
        assert not server.path.startswith(str(place)) and len(server.path) <= 107
        server.close()


def test_clients_that_say_nothing_or_too_much_harm_nobody(ring):
    """More connections than the queue of the socket holds; what a client sends is not read."""
    before = descriptors()
    silent = []
    for number in range(3 * handles_module.BACKLOG):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(ring._device.socket)  # waits where the queue is full
        if number % 3 == 0:
            with suppress(OSError):  # it has answered and hung up
                client.send(b"x" * 5000)
        if number % 3 == 1:
            client.close()
        silent.append(client)
    with Reader(ring.name) as reader, reader.device_memory() as handle:
        assert handle.generation == ring.generation
    for client in silent:
        client.close()
    publish(ring, 1)
    assert comes_back_to(before)


def test_a_client_of_another_user_gets_no_answer(ring, monkeypatch):
    monkeypatch.setattr(handles_module, "_uid_of", lambda client: os.geteuid() + 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(20)
        client.connect(ring._device.socket)
        assert socket.recv_fds(client, 1000, 4)[:2] == (b"", [])


def test_a_writer_without_descriptors_answers_when_it_has_some(ring, monkeypatch):
    """accept() fails for a while, as with EMFILE."""
    failing, real = threading.Event(), socket.socket.accept

    def accept(self):
        if self is ring._device._server._listener and not failing.is_set():
            failing.set()
            raise OSError(24, "too many open files")
        return real(self)

    monkeypatch.setattr(socket.socket, "accept", accept)
    with Reader(ring.name) as reader, reader.device_memory() as handle:
        assert failing.is_set() and handle.fd >= 0


class Liar:
    """A ring of device memory whose socket answers what a test says."""

    def __init__(self, name: str, folder: Path, kind: Memory = Memory.OPAQUE_FD, slots: int = 6) -> None:
        self.path = str(folder / "liar")
        self.kind, self.slots = kind, slots
        about = dict(name=name, format=1, width=WIDTH, height=HEIGHT, fps_numerator=16, fps_denominator=1, readers=4)
        about |= dict(slots=slots, events=64, stall_ns=10**9, memory=int(kind))
        self.stride = load().ring_frame_stride(**about)
        self.writer = load().RingWriter(**about, handle_socket=self.path)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.listener.settimeout(30)

    def good(self, **other: object) -> bytes:
        about = dict(generation=self.writer.generation(), size=self.slots * self.stride, stride=self.stride)
        return packet(**about | dict(slots=self.slots, kind=int(self.kind), uuid=bytes(16)) | other)

    def answer(self, data: bytes | None, fds: tuple[int, ...] = ()) -> None:
        """Serve one client. data: None to hang up without a word"""
        client, _ = self.listener.accept()
        with client:
            if data is not None:
                client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))])

    def close(self) -> None:
        self.listener.close()
        self.writer.close()


@pytest.fixture
def liar(ring_name, standin, request):
    made = Liar(ring_name, standin, getattr(request, "param", Memory.OPAQUE_FD))
    yield made
    made.close()


def ask(client: Program) -> list[str]:
    client.process.stdin.write("?\n")
    client.process.stdin.flush()
    return client.wait_for("CF_").split(" ", 2)


def test_every_field_of_the_answer_is_checked(liar, program, ring_name, tmp_path):
    client = program("ask", ring_name)
    client.wait_for("open")
    full, stride, slots = liar.good(), liar.stride, liar.slots
    with (tmp_path / "device").open("wb") as file:
        fd = (file.fileno(),)
        wrong = {
            "gave 0 bytes": (None, ()),
            "gave 127 bytes of 128": (full[:127], fd),
            "gave 1 bytes": (b"x", fd),
            "magic": (b"CFRHND2" + full[7:], fd),
            "generation": (liar.good(generation=liar.writer.generation() + 1), fd),
            "memory": (liar.good(kind=2), fd),
            "slot_count": (liar.good(slots=slots - 1), fd),
            "device_stride": (liar.good(stride=stride + 4096), fd),
            "size": (liar.good(size=slots * stride - 1), fd),
            "descriptor": (full, ()),
            "several descriptors": (full, fd * 2),
            "several descriptors, or": (full, fd * 100),
        }
        for field, (data, fds) in wrong.items():
            threading.Thread(target=liar.answer, args=(data, fds)).start()
            result, leaked, said = ask(client)
            assert (result, leaked) == ("CF_ERROR_BAD_RING", "0") and field in said and ring_name in said
        for size in (0, 1, slots * stride + (1 << 30), 1 << 63, (1 << 64) - 1):
            threading.Thread(target=liar.answer, args=(liar.good(size=size), fd)).start()
            assert ask(client)[0] == "CF_ERROR_BAD_RING", size
        for good in (full, liar.good(size=slots * stride + (2 << 20)), full + b"of a later version" * 99):
            threading.Thread(target=liar.answer, args=(good, fd)).start()
            assert ask(client)[:2] == ["CF_SUCCESS", "0"]
    client.end()


def test_answers_at_random(liar, program, ring_name, tmp_path):
    """Damaged and cut packets with any number of descriptors: refused, or good in all that counts; nothing leaks."""
    client, chance, full, results = program("ask", ring_name), random.Random(3), liar.good(), []
    client.wait_for("open")
    with (tmp_path / "device").open("wb") as file:
        for _ in range(400):
            data = bytearray(full)
            for _ in range(chance.choice([0, 1, 1, 3, 30])):
                data[chance.randrange(len(data))] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
            cut = data[: chance.choice([len(data)] * 5 + [chance.randrange(1, len(data))])]
            fds = (file.fileno(),) * chance.choice([0, 1, 1, 1, 1, 2, 5])
            thread = threading.Thread(target=liar.answer, args=(bytes(cut), fds))
            thread.start()
            result, leaked, _ = ask(client)
            thread.join()
            assert leaked == "0" and result in ("CF_SUCCESS", "CF_ERROR_BAD_RING")
            fields = [offset for offset in range(40) if data[offset] != full[offset] and offset not in range(16, 24)]
            assert result == "CF_ERROR_BAD_RING" or (len(fds) == 1 and len(cut) == len(full) and not fields)
            results.append(result)
    assert results.count("CF_SUCCESS") > 40 and results.count("CF_ERROR_BAD_RING") > 100
    client.end()


def test_a_writer_that_does_not_answer_is_not_waited_for(liar, program, ring_name):
    """Nobody accepts: the first hang on an answer, the others on a full queue. Then nobody is there."""
    clients = [program("ask", ring_name) for _ in range(4)]
    for client in clients:
        client.wait_for("open")
        client.process.stdin.write("?\n")
        client.process.stdin.flush()
    assert {client.wait_for("CF_").split()[0] for client in clients} == {"CF_ERROR_TIMEOUT"}
    Path(liar.path).unlink()
    result, leaked, said = ask(clients[0])
    assert (result, leaked) == ("CF_ERROR_NOT_FOUND", "0") and "its writer has ended" in said


@pytest.mark.parametrize("liar", [Memory.CUDA_IPC], indirect=True)
def test_a_handle_of_cuda_ipc_is_passed_as_it_is(liar, ring_name):
    secret = bytes(range(64))
    with Reader(ring_name) as reader:
        threading.Thread(target=liar.answer, args=(liar.good(ipc=secret, uuid=b"u" * 16),)).start()
        found = reader.device_memory()
        assert (found.memory, found.fd, found.ipc_handle, found.uuid) == (Memory.CUDA_IPC, -1, secret, b"u" * 16)
        with Path("/dev/null").open() as file:
            threading.Thread(target=liar.answer, args=(liar.good(ipc=secret), (file.fileno(),))).start()
            with pytest.raises(RingError, match="descriptor"):
                reader.device_memory()


# Versions -------------------------------------------------------------------------------------------------------------


def header_of(name: str) -> tuple[bytes, dict]:
    data = Path(f"/dev/shm/cfengine.{name}").read_bytes()
    names = "major minor total generation header slots leases events slots_at frames_at frame leases_at queue_at"
    values = struct.unpack_from("<IIQQ4I5Q", data, 8)
    rest = dict(zip(("format", "memory", "width", "height"), struct.unpack_from("<4I", data, 88), strict=True))
    return data, dict(zip(names.split(), values, strict=True)) | rest


def test_a_reader_of_version_one_comes_as_far_as_the_kind_of_memory(ring):
    """What 1.0 checks before it, in its order, is in order; it then refuses the ring by the name of that field."""
    data, found = header_of(ring.name)
    assert (found["major"], found["minor"], found["total"], found["header"]) == (1, 1, len(data), 512)
    assert found["slots_at"] + 128 * found["slots"] <= found["frames_at"]
    assert found["frames_at"] % 65536 == found["leases_at"] % 65536 == 0 == found["frame"]
    assert found["frames_at"] == found["leases_at"], "there is no frames part"
    assert found["queue_at"] == found["leases_at"] + 64 * found["leases"] and found["memory"] == 3 != 1
    assert struct.unpack_from("<Q", data, 272)[0] >= 280 * HEIGHT
    assert data[160:268].rstrip(b"\0").decode() == ring._device.socket


def test_a_ring_in_host_memory_is_of_version_one(ring_name):
    with Ring(ring_name, WIDTH, HEIGHT) as ring, Reader(ring_name) as reader:
        ring.publish(picture(1, WIDTH, HEIGHT))
        data, found = header_of(ring_name)
        assert (found["major"], found["minor"], found["memory"]) == (1, 0, 1) and not any(data[160:320])
        with reader.acquire(Policy.NEXT) as frame:
            assert frame.memory is Memory.HOST and frame.offsets == (0, 0) and frame.flags in Flags
        with pytest.raises(RingError, match="in host memory; read") as raised:
            reader.device_memory()
        assert raised.value.result == "CF_ERROR_MEMORY_KIND"


@pytest.mark.parametrize(
    ("at", "code", "value", "field"),
    [
        (12, "<I", 0, "version_minor"),
        (56 + 8, "<Q", 4096, "frame_bytes"),
        (92, "<I", 0, "memory"),
        (92, "<I", 4, "memory"),
        (104, "<I", 1 << 31, "stride"),
        (160, "<B", 0, "handle_socket"),
        (160, "<B", ord("x"), "handle_socket"),
        (160, "108s", b"/" * 108, "handle_socket"),
        (272, "<Q", 0, "stride"),
        (272, "<Q", 63, "device_stride"),
        (272, "<Q", 1 << 63, "device_stride"),
    ],
)
def test_damaged_headers_are_refused(ring, at, code, value, field):
    with Path(f"/dev/shm/cfengine.{ring.name}").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        Reader(ring.name).close()
        struct.pack_into(code, memory, at, value)
        with pytest.raises(RingError, match=f": {field} is out of range") as raised:
            Reader(ring.name)
        assert raised.value.result == "CF_ERROR_BAD_RING"


def test_the_packet_is_the_documented_one():
    data = packet(generation=2, size=3, stride=4, slots=5, kind=3, uuid=b"u" * 16, ipc=b"i" * 64)
    assert len(data) == PACKET.size == 128 and data[:8] == b"CFRHND1\0"
    assert struct.unpack_from("<QQQII", data, 8) == (2, 3, 4, 5, 3) and data[40:120] == b"u" * 16 + b"i" * 64
