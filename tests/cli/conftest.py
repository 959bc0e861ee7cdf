"""An engine that plays what a real one does or fails at, for the commands in front of it."""

import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from cfengine import cli_generate
from cfengine.cli import app
from cfengine.config import preset
from cfengine.types import ChunkTimings, Frame, LayerEvents

SIGNALLED = textwrap.dedent("""
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("fake", sys.argv[1])
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    from cfengine import cli_generate
    from cfengine.cli import app

    class Loud(fake.FakeEngine):
        def stream(self, *arguments, **options):
            print("begun", flush=True)
            yield from super().stream(*arguments, **options)

    cli_generate.load = lambda request, progress: Loud(delay=float(sys.argv[2]))
    app(["generate", "hills", "--seconds", sys.argv[3]])
""")


class FakeEngine:
    """Grey frames in chunks of 9, 12, 12, ...; `fail_at` raises `error` in place of that frame, `delay` s a chunk."""

    def __init__(self, fail_at=None, error=None, delay=0.0):
        self.config = preset("tiny-world")
        self.fail_at, self.error, self.delay = fail_at, error, delay
        self.request, self.closed, self.stream_closed = None, False, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def stream(self, prompt, *, seed=0, num_frames=None):
        self.request = (prompt, seed, num_frames)
        try:
            for index in range(num_frames):
                chunk = 0 if index < 9 else 1 + (index - 9) // 12
                if index == 0 or (index - 9) % 12 == 0 and index >= 9:
                    time.sleep(self.delay)
                if index == self.fail_at:
                    raise self.error
                timings = ChunkTimings(chunk, denoise=0.05, decode=0.01, memory=LayerEvents(2, 1))
                yield Frame(np.full((64, 96, 3), index % 256, np.uint8), index, index / 16, timings)
        finally:
            self.stream_closed = True


@pytest.fixture
def fake_engine():
    return FakeEngine


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call the command in an empty folder, with a fake engine or with none that may be loaded."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, engine=None):
        def load(request, progress):
            assert engine is not None, "the model was loaded"
            if isinstance(engine, BaseException):
                raise engine
            return engine

        monkeypatch.setattr(cli_generate, "load", load)
        return CliRunner().invoke(app, list(arguments))

    return call


@pytest.fixture
def python():
    """Run code in a process of its own."""

    def call(code, *arguments, **options):
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)

    return call


@pytest.fixture
def played():
    """played(delay, seconds=600) -> a command line that makes a video with a FakeEngine of `delay` seconds a chunk."""

    def command(delay, seconds=600):
        return [sys.executable, "-c", SIGNALLED, __file__, str(delay), str(seconds)]

    return command
