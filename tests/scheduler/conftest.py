"""A stand-in for streams, events and graphs, so that the lane of a GPU runs here but for capture itself."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial

import pytest
import torch

from cfengine import engine as engine_module
from cfengine import lanes as lanes_module
from cfengine.memory.budget import Budget
from cfengine.memory.memory import Memory
from cfengine.scheduler.device_lane import DeviceLane
from cfengine.session import Session


class InlineEvent:
    def __init__(self, runtime: InlineRuntime) -> None:
        self.runtime, self.log, self.time, self.after = runtime, runtime.log, None, ""

    def record(self) -> None:
        self.runtime.check_held()
        self.time, self.after = time.perf_counter(), self.runtime.queued[-1] if self.runtime.queued else ""

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, other: InlineEvent) -> float:
        return 1e3 * (other.time - self.time)


class InlineStream:
    """`waits` says after which work of another stream this one goes on."""

    def __init__(self, name: str, runtime: InlineRuntime) -> None:
        self.name, self.runtime = name, runtime
        self.waits: list[str] = []

    def wait_event(self, event: InlineEvent) -> None:
        self.runtime.check_held()
        assert event.time is not None, "a stream waits for what was never queued"
        self.waits.append(event.after)

    def synchronize(self) -> None:
        self.runtime.check_held()


class InlineRuntime:
    """What `CudaRuntime` does, at once and in order; `log` lists replays and waits.

    It holds the lane to what keeps another thread's capture whole: whoever queues on a stream, or waits for it, is in
    `on` with it.
    """

    graphs = False

    def __init__(self) -> None:
        self.compute, self.decoding = InlineStream("compute", self), InlineStream("decoding", self)
        self._queue, self._holders = threading.RLock(), []
        self.log: list[str] = []
        self.queued: list[str] = []
        self.captured: list[str] = []

    def lend(self, tensor: torch.Tensor) -> None:
        pass

    @contextlib.contextmanager
    def on(self, stream: InlineStream):
        with self._queue:
            self._holders.append(threading.get_ident())
            try:
                yield
            finally:
                self._holders.pop()

    def check_held(self) -> None:
        assert self._holders and self._holders[-1] == threading.get_ident(), "a stream is used outside of `on`"

    def join(self) -> None:
        self.log.append("join")

    def aside(self, work):
        return work()

    def event(self) -> InlineEvent:
        return InlineEvent(self)

    def pinned(self, shape, dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def capture(self, work, stream: InlineStream):
        name = f"{work.func.__name__} {work.args[0]}" if isinstance(work, partial) else work.__name__
        self.captured.append(name)

        self.check_held()

        def replay():
            self.check_held()
            self.log.append(name)
            self.queued.append(name)
            return work()

        return replay


@pytest.fixture
def lane_of():
    """make(engine, sessions=1) -> (DeviceLane on the CPU, its runtime)."""

    def make(engine, sessions: int = 1):
        runtime, config = InlineRuntime(), engine.config
        budget = Budget(config, engine.dtype, engine.device, sessions) if sessions > 1 else None
        memories = [Memory(config, engine.ops, engine.dtype, engine.device, budget) for _ in range(sessions)]
        decoders = [engine.codec.decoder() for _ in range(sessions)]
        lane = DeviceLane(engine._scheduler, config, memories, decoders, runtime)
        for _ in range(sessions):
            lane.join()
        lane.expect([0] * sessions)
        return lane, runtime

    return make


@pytest.fixture
def device_session(lane_of):
    """make(engine, prompt, seed) -> a Session that runs as on a GPU, but for capture."""

    def make(engine, prompt: str, seed: int = 0) -> Session:
        return Session(engine.config, lane_of(engine)[0], engine._prompts, prompt, seed)

    return make


@pytest.fixture
def device_engine(toy_engine, monkeypatch):
    """make(...) -> an Engine on the CPU that opens the lanes of a GPU, with room for everything."""
    monkeypatch.setattr(lanes_module, "check_fits", lambda *args: None)

    def make(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "open_runtime", lambda *args: InlineRuntime())
            return toy_engine(*args, **options)

    return make
