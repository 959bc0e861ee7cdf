"""The ring in C: each behaviour, then full speed under sanitizers, damaged memory, and processes that are killed."""

from __future__ import annotations

import random
import re
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.embed

UNIT = re.findall(r"TEST\((\w+)\),", (Path(__file__).parent / "unit.c").read_text())


def test_every_unit_test_is_run(programs):
    assert programs.run("unit").split() == UNIT and len(UNIT) > 15


@pytest.mark.parametrize("name", UNIT)
def test_behaviour(programs, ring_name, name):
    programs.run("unit", ring_name, name, kind="address", timeout=60)


@pytest.mark.parametrize("kind", ["thread", "address"])
def test_two_readers_and_a_writer(programs, ring_name, kind):
    said = programs.run("stress", ring_name, "100000", kind=kind)
    assert "100000 cycles" in said


@pytest.mark.parametrize("kind", ["thread", "address"])
def test_all_threads_of_a_session_follow_new_writers(programs, ring_name, kind):
    assert "of 21 seen" in programs.run("follow", ring_name, "20", kind=kind)


@pytest.mark.slow
def test_ten_million_cycles_without_a_torn_frame(programs, ring_name):
    said = programs.run("stress", ring_name, "10000000")
    cycles, frames = map(int, re.search(r"(\d+) cycles, (\d+) frames", said).groups())
    assert cycles == 10_000_000 and frames > 100_000  # the writer was at work all the time


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_rings_are_refused_or_harmless(programs, ring_name, seed):
    said = programs.run("fuzz", ring_name, str(seed), "3000", "2", kind="address")
    opened, refused = map(int, re.search(r"(\d+) opened and used, (\d+) refused", said).groups())
    assert opened + refused == 3001 and said.count("in flight") == 2


class Peer:
    """A process that a test kills."""

    def __init__(self, programs, *arguments: str) -> None:
        command = [str(programs.path("peer", "address")), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def waits(self, word: str) -> Peer:
        assert self.process.stdout.readline().strip() == word, self.process.stderr.read()
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)

    def says(self) -> str:
        said, complained = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, complained
        return said


@pytest.fixture
def peer(programs):
    peers = []

    def start(*arguments: str) -> Peer:
        peers.append(Peer(programs, *arguments))
        return peers[-1]

    yield start
    for one in peers:
        if one.process.poll() is None:
            one.kill()


@pytest.mark.slow
def test_writers_are_killed_under_a_reading_client(peer, ring_name):
    """Restarts at random moments: every frame is whole, and the client follows each writer."""
    chance = random.Random(7)
    writer = peer("write", ring_name).waits("ready")
    readers = [peer("read", ring_name, "8") for _ in range(2)]
    time.sleep(1)
    for _ in range(3):
        time.sleep(chance.uniform(0.5, 1))
        writer.kill()
        writer = peer("write", ring_name).waits("ready")
    for reader in readers:
        said = reader.says()
        writers, frames = map(int, re.search(r"writers (\d+) frames (\d+)", said).groups())
        assert writers == 4 and frames > 100 and "alive 1" in said


@pytest.mark.slow
def test_readers_are_killed_while_they_hold_frames(peer, ring_name):
    """Four leases, and eight readers that die one after the other with a frame in hand, beside one that lives."""
    peer("write", ring_name).waits("ready")
    reader = peer("read", ring_name, "6")
    for _ in range(8):
        peer("hold", ring_name).waits("held").kill()
    said = reader.says()
    assert "writers 1" in said and int(re.search(r"frames (\d+)", said)[1]) > 100
