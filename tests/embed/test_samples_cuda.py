"""The sample that reads device memory with CUDA, against a driver that is played on files in memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.embed.sample_tools import SAMPLES, Program, client_sources, compile_c
from tests.embed.standin import picture

pytestmark = pytest.mark.embed

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """Compiled against NVIDIA's own header, which triton brings, and linked with the driver that is played."""
    found = importlib.util.find_spec("triton")
    header = Path(found.origin).parent / "backends" / "nvidia" / "include" / "cuda.h" if found else None
    if header is None or not header.exists():
        pytest.skip("there is no cuda.h; the test extra installs triton, which has one, on Linux on x86-64")
    sources = SAMPLES / "cuda" / "main.c", HERE / "sample_cuda_driver.c", *client_sources()
    checked = "-fsanitize=address,undefined", "-Werror", "-isystem", header.parent
    return compile_c(tmp_path_factory.mktemp("cuda") / "sample", *checked, *sources)


def test_it_reads_every_frame_and_imports_the_memory_of_each_writer(sample, ring_name):
    writer = sys.executable, HERE / "standin.py", ring_name, "12"
    expected = [
        f"frame {id} mean {(float(picture(id, 70, 46).sum()) + 255 * 70 * 46) / (4 * 70 * 46):.3f}"
        for id in range(1, 13)
    ]
    with Program(*writer) as first:
        first.wait_for("published")
        reader = Program(sample, ring_name, "24")
        reader.wait_for("frame 12")
        first.kill()
    with reader, Program(*writer) as second:
        second.wait_for("published")
        assert reader.end() == expected * 2


def test_it_says_what_is_wrong(sample, ring_name):
    with Program(sample, ring_name) as reader:
        assert "there is no ring" in reader.wait_for("ring")
