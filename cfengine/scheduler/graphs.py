"""CUDA graphs, and the streams, events and pinned memory around them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cfengine.errors import KernelError
from cfengine.ops import Ops, row


class Graph:
    """A call captured once; what it returned is written anew by every replay.

    The call has run before on the same stream, so that kernels are compiled and constants are on the device. It may
    allocate: such memory comes from the pool and keeps its address for the life of the graph. Nobody else may queue on
    the stream meanwhile; see `CudaRuntime.on`.
    """

    def __init__(self, work: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, of a consumer say, may go on allocating and copying on streams of their own
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._result = work()

    def __call__(self) -> Any:
        self._graph.replay()
        return self._result


class CudaRuntime:
    """Streams and graph memory of one engine.

    compute carries all passes of all sessions, one after the other, so that their graphs share one pool of scratch
    memory; decoding carries decoders and the copies to the host, beside the clean passes, before them where both wait.
    Prompts are encoded on a third, from any thread.

    apart: held to capture, or to wait for the whole device, which no mode of capture allows while any stream of it is
    captured; torch wants one capture a process, too
    """

    apart = threading.Lock()

    def __init__(self, device: torch.device | str, *, graphs: bool = True) -> None:
        self.device, self.graphs = torch.device(device), graphs
        self._queue = threading.RLock()  # of compute and decoding
        with torch.cuda.device(self.device):
            self.compute, self.decoding = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
            self._prompts = torch.cuda.Stream()
            self._pools = {stream: torch.cuda.graph_pool_handle() for stream in (self.compute, self.decoding)}
            with self.apart:
                torch.cuda.synchronize()  # weights have arrived: every stream may read them

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """A context in which a thread queues work on compute or decoding, waits for them or captures them.

        One thread at a time. Being captured is a state of the stream and not of the thread that began it: what another
        thread queues on it is not done but becomes part of the graph, and waiting for it breaks the capture, whatever
        its mode, which is about calls such as cudaMalloc alone (CUDA Runtime API, `cudaStreamBeginCapture`,
        `cudaThreadExchangeStreamCaptureMode`). So chunks of other sessions wait until what is held here is over.
        """
        with self._queue, torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let compute wait for what the caller has queued on its own stream."""
        with self._queue:
            self.compute.wait_stream(torch.cuda.current_stream(self.device))

    def aside(self, work: Callable[[], list[tuple[Tensor, ...]]]) -> list[tuple[Tensor, ...]]:
        """Do work beside all other work, and wait for it; its tensors are made for compute to read."""
        with torch.cuda.stream(self._prompts):
            made = work()
        for tensor in {tensor for tensors in made for tensor in tensors}:
            tensor.record_stream(self.compute)
        self._prompts.synchronize()
        return made

    def lend(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor made on compute until what the caller queues on its own stream has read it."""
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that copies to and from the device need not wait for."""
        return torch.zeros(shape, dtype=dtype).pin_memory()

    def capture(self, work: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], Any]:
        """`work` to be called again and again on a stream: a graph, or without graphs the call itself."""
        if not self.graphs:
            return work
        with self.on(stream), self.apart:
            return Graph(work, stream, self._pools[stream])


def open_runtime(device: torch.device | str, graphs: bool) -> CudaRuntime | None:
    """Streams and graphs of a GPU, None for a CPU."""
    return CudaRuntime(device, graphs=graphs) if torch.device(device).type == "cuda" else None


def check_captured(ops: Ops, used: Iterable[str]) -> None:
    """Raise KernelError unless a graph can hold the implementations of the operations that are used."""
    for op in used:
        name = ops.names[op]
        if not next(candidate for candidate in row(op, "cuda") if candidate.name == name).captured:
            others = [candidate.name for candidate in row(op, "cuda") if candidate.captured]
            raise KernelError(
                f"{op}: implementation {name!r} reads tables on the host, which a captured CUDA graph cannot; choose "
                f"{' or '.join(others)}, or build the engine with graphs=False"
            )
