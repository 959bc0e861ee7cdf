"""The socket that passes the handle of device memory, clients and writers that lie, and versions of the layout."""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from cfengine.embed import Flags, Format, Memory, Policy, Reader, Ring
from cfengine.embed import handles as handles_module
from cfengine.embed.handles import PACKET, HandleServer, packet
from cfengine.embed.native import load
from cfengine.errors import RingError
from tests.embed.sample_tools import Program
from tests.embed.standin import comes_back_to, descriptors, picture, publish

pytestmark = [pytest.mark.embed, pytest.mark.usefixtures("standin")]

WIDTH, HEIGHT = 70, 46  # rows of 280 bytes: not as wide as their stride
FORMATS = [Format.RGBA8, Format.NV12]


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
