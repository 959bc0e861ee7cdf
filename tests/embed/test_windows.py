"""The Windows half of the client, built by mingw-w64 and run under Wine: libraries, two processes, a killed writer."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.embed.conftest import CLIENT, HERE, find_tool

pytestmark = [pytest.mark.embed, pytest.mark.hosts]

MINGW = "apt install gcc-mingw-w64-x86-64"
WINE = "apt install wine wine64"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/embed/peer.c as a Windows program, without a warning."""
    compiler = find_tool("x86_64-w64-mingw32-gcc-posix", MINGW)  # the flavour whose libraries have nanosleep
    program = tmp_path_factory.mktemp("windows") / "peer.exe"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-DCF_STATIC", "-static"]
    places = [f"-I{CLIENT / 'include'}", f"-I{CLIENT}"]
    sources = [str(HERE / "peer.c"), *map(str, sorted(CLIENT.glob("*.c")))]
    subprocess.run([compiler, *flags, *places, *sources, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with a Windows of its own, which has begun."""
    surroundings = {**os.environ, "WINEPREFIX": str(tmp_path_factory.mktemp("wine")), "WINEDEBUG": "-all"}
    subprocess.run([find_tool("wine", WINE), "wineboot", "-i"], env=surroundings, check=True, timeout=120)
    return surroundings


@contextmanager
def writer(peer: Path, wine: dict[str, str], name: str) -> Iterator[subprocess.Popen]:
    """A writer that publishes until it is killed, which takes the Windows process with it."""
    command = [find_tool("wine", WINE), str(peer), "write", name]
    process = subprocess.Popen(command, env=wine, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.wait()


def read(peer: Path, wine: dict[str, str], name: str, seconds: float) -> subprocess.Popen:
    command = [find_tool("wine", WINE), str(peer), "read", name, str(seconds)]
    return subprocess.Popen(command, env=wine, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def saw(reader: subprocess.Popen) -> dict[str, int]:
    """What a reader says: it checks every word of every frame itself."""
    out, errors = reader.communicate(timeout=60)
    assert reader.returncode == 0, errors
    return {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", out)}


def test_libraries_build_without_a_warning(tmp_path: Path) -> None:
    compiler = find_tool("x86_64-w64-mingw32-gcc", MINGW)
    about = ["-DCMAKE_SYSTEM_NAME=Windows", f"-DCMAKE_C_COMPILER={compiler}", "-DCMAKE_C_FLAGS=-Werror"]
    cmake = find_tool("cmake", "pip install cmake")
    subprocess.run([cmake, "-S", str(CLIENT), "-B", str(tmp_path), *about], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
    shared = (tmp_path / "libcfengine_client.dll").read_bytes()
    assert b"cf_frame_acquire\0" in shared and (tmp_path / "libcfengine_client.a").exists()


def test_a_reader_sees_whole_frames_of_another_process(peer: Path, wine: dict[str, str]) -> None:
    with writer(peer, wine, "wine_two"):
        seen = saw(read(peer, wine, "wine_two", 1.5))
    assert seen["writers"] == 1 and seen["alive"] == 1 and seen["frames"] > 10 and seen["lost"] == 0


def test_a_reader_follows_a_writer_that_was_killed_and_began_anew(peer: Path, wine: dict[str, str]) -> None:
    with writer(peer, wine, "wine_kill"):
        reader = read(peer, wine, "wine_kill", 12)
        time.sleep(3)
    with writer(peer, wine, "wine_kill"):
        seen = saw(reader)
    assert seen["writers"] == 2 and seen["alive"] == 1 and seen["frames"] > 10


def test_a_ring_without_a_writer_is_named(peer: Path, wine: dict[str, str]) -> None:
    reader = read(peer, wine, "wine_none", 0.1)
    _, errors = reader.communicate(timeout=60)
    assert reader.returncode == 1 and "there is no ring wine_none; start its writer" in errors
