"""Capture in one thread beside work in another, by CUDA's rules for streams, on a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from cfengine.scheduler.graphs import CudaRuntime

pytestmark = pytest.mark.cpu


class Stream:
    """Does what is queued, or, while it is captured, takes it into the graph, whichever thread it comes from."""

    made: list[Stream] = []

    def __init__(self, priority: int = 0) -> None:
        self.done: list[str] = []
        self.graph: list[str] | None = None
        self.made.append(self)

    def queue(self, work: str) -> None:
        (self.done if self.graph is None else self.graph).append(work)

    def wait_stream(self, other: Stream) -> None:
        self.queue("wait")

    def synchronize(self) -> None:
        assert self.graph is None, "operation not permitted when stream is capturing"


class Cuda:
    """What `CudaRuntime` uses of torch.cuda."""

    Stream, graph_pool_handle = Stream, object

    def __init__(self) -> None:
        self.default = Stream()

    def synchronize(self) -> None:
        for stream in Stream.made:
            stream.synchronize()

    def device(self, device):
        return contextlib.nullcontext()

    def stream(self, stream: Stream):
        return contextlib.nullcontext()

    def current_stream(self, device) -> Stream:
        return self.default

    class CUDAGraph:
        def __init__(self) -> None:
            self.nodes: list[str] = []

    @contextlib.contextmanager
    def graph(self, graph: Cuda.CUDAGraph, pool, stream: Stream, capture_error_mode: str):
        self.synchronize()
        stream.graph = graph.nodes
        yield
        stream.graph = None


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    monkeypatch.setattr(Stream, "made", [])
    made = Cuda()
    for name in (
        "Stream",
        "graph_pool_handle",
        "synchronize",
        "device",
        "stream",
        "current_stream",
        "CUDAGraph",
        "graph",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def queue_a_chunk(runtime: CudaRuntime) -> None:
    with runtime.on(runtime.compute):
        runtime.compute.queue("chunk")


def wait(runtime: CudaRuntime) -> None:
    with runtime.on(runtime.compute):
        runtime.compute.synchronize()
    runtime.compute.queue("chunk")


def join(runtime: CudaRuntime) -> None:
    runtime.join()
    runtime.compute.done[:] = ["chunk"] * len(runtime.compute.done)


def open_another(runtime: CudaRuntime) -> None:
    CudaRuntime("cuda")
    runtime.compute.queue("chunk")


def capture_in_another(runtime: CudaRuntime) -> None:
    other = CudaRuntime("cuda")
    other.capture(lambda: other.compute.queue("theirs"), other.compute)
    runtime.compute.queue("chunk")


@pytest.mark.parametrize("act", [queue_a_chunk, wait, join, open_another, capture_in_another])
def test_what_another_thread_does_is_done_after_the_capture_and_not_in_it(cuda, act) -> None:
    runtime, began = CudaRuntime("cuda"), threading.Event()

    def passes() -> str:
        runtime.compute.queue("first")
        began.set()
        time.sleep(0.1)  # the other thread comes now
        runtime.compute.queue("second")
        return "captured"

    graphs = []
    opening = threading.Thread(target=lambda: graphs.append(runtime.capture(passes, runtime.compute)))
    opening.start()
    assert began.wait(10)
    act(runtime)
    opening.join()
    assert graphs[0]._graph.nodes == ["first", "second"] and runtime.compute.done == ["chunk"]


def test_the_thread_that_captures_may_hold_its_queue_already(cuda) -> None:
    runtime = CudaRuntime("cuda")
    with runtime.on(runtime.compute), runtime.on(runtime.decoding):
        graph = runtime.capture(lambda: runtime.decoding.queue("frames"), runtime.decoding)
    assert graph._graph.nodes == ["frames"] and not runtime.decoding.done
    plain = CudaRuntime("cuda", graphs=False)
    assert plain.capture(len, plain.compute) is len
