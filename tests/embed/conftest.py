"""C programs for tests of the ring, compiled here with the system's compiler, and names that no other run has."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from cfengine.embed import Ring
from cfengine.embed import device as device_module
from tests.embed.sample_tools import Program
from tests.embed.standin import MemfdMemory

HERE = Path(__file__).resolve().parent
CLIENT = HERE.parent.parent / "csrc" / "client"
FLAGS = {
    "plain": ["-O2", "-Werror"],  # alone: sanitizers make compilers suspect variables
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
LIBRARIES = "gcc's and clang's packages bring them on Debian and Ubuntu; Fedora: dnf install libasan libtsan libubsan"


def find_tool(name: str, remedy: str) -> str:
    """Path of a program; the test fails, with the remedy, where there is none."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.fail(f"{name} was not found, and these tests need it; {remedy}")
    return path


def find_compiler() -> str:
    return find_tool(os.environ.get("CC") or "cc", "install a C compiler (Debian, Ubuntu: apt install gcc)")


class Programs:
    """Compiles tests/embed/NAME.c with all of csrc/client, once for each kind of check."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, kind: str = "plain") -> Path:
        target = self.folder / f"{name}-{kind}"
        if target.exists():
            return target
        sources = [str(HERE / f"{name}.c"), *map(str, self.objects(kind))]
        self.compile([*sources, "-o", str(target), "-pthread", "-lrt"], kind)
        return target

    def objects(self, kind: str) -> list[Path]:
        """The client and the writer, compiled; for ThreadSanitizer with one map of a ring (one_map.c says why)."""
        sources, made = set(CLIENT.glob("*.c")), []
        if kind == "thread":
            sources = sources - {CLIENT / "shm_posix.c"} | {HERE / "one_map.c"}
        for source in sorted(sources):
            made.append(self.folder / f"{source.stem}-{kind}.o")
            if not made[-1].exists():
                self.compile(["-c", str(source), "-o", str(made[-1])], kind)
        return made

    def compile(self, arguments: list[str], kind: str) -> None:
        command = [find_compiler(), "-std=gnu11", "-Wall", "-Wextra", *FLAGS[kind]]
        command += [f"-I{CLIENT}", f"-I{CLIENT / 'include'}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and kind != "plain" and "san" in done.stderr:
            pytest.fail(f"{done.stderr}\nthe sanitizers' libraries are missing; {LIBRARIES}")
        assert done.returncode == 0, done.stderr

    def run(self, name: str, *arguments: str, kind: str = "plain", timeout: float = 600) -> str:
        """Run a program to its end and return what it said; the test fails with what it complained of."""
        command = [str(self.path(name, kind)), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if "unexpected memory mapping" in done.stderr:  # ThreadSanitizer and more randomness of addresses than it takes
            command = [find_tool("setarch", "install util-linux"), platform.machine(), "-R", *command]
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def tool():
    return find_tool


@pytest.fixture(scope="session")
def compiler():
    return find_compiler()


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def ring_name(request):
    """A name of this test alone; what is left under it is removed."""
    letters = "".join(c if c.isalnum() else "-" for c in request.node.name)[:40]
    name = f"test-{os.getpid()}-{letters}"
    yield name
    Path(f"/dev/shm/cfengine.{name}").unlink(missing_ok=True)


@pytest.fixture
def standin(monkeypatch):
    """Rings get the stand-in's memory, and sockets a folder of this test, with a path that is short everywhere."""
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.setattr(device_module, "allocate", MemfdMemory)
        yield Path(folder)


@pytest.fixture
def ring(ring_name):
    with Ring(ring_name, 70, 46, slots=64, memory="opaque_fd") as made:
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
