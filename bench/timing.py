"""Time of one call on a processor or a GPU, the machine's GEMM rate, and the distance between two results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cfengine.config import EngineConfig

CACHES = 3  # inputs that are used in turn hold this many times what the last-level cache holds
MOST_SETS = 24
LEAST, MOST = 2, 400  # timed samples


def timed(function: Callable, *arguments) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


class Gemm:
    """Rate of this machine's matrix products: those of the feed-forward and a square one; the best median counts."""

    def __init__(self, config: EngineConfig, dtype: torch.dtype) -> None:
        tokens = config.memory.chunk_frames * config.page_tokens
        dim, ffn, square = config.model.dim, config.model.ffn_dim, 5 * config.model.dim
        self.times: list[tuple[float, list[float]]] = []
        self.operands = []
        for m, k, n in ((tokens, dim, ffn), (tokens, ffn, dim), (square, square, square)):
            self.operands.append((torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)))
            self.times.append((2.0 * m * k * n, []))
            F.linear(*self.operands[-1])

    def measure(self, repeats: int = 5) -> None:
        for (_, times), operands in zip(self.times, self.operands, strict=True):
            times += [timed(F.linear, *operands) for _ in range(repeats)]

    @property
    def rate(self) -> float:
        """Operations per second."""
        return max(flops / median(times) for flops, times in self.times)


def difference(result, expected) -> tuple[float, float]:
    """Largest error over largest value, and root mean square error over root mean square."""
    result, expected = result.double(), expected.double()
    error = result - expected
    return float(error.abs().max() / expected.abs().max()), float(error.norm() / expected.norm())


class Times(NamedTuple):
    """Seconds of one call: median, 10th and 90th percentile of `count` samples.

    how: "graph" (replays of a captured graph, launches not counted), "events" (between two events behind a flush of
    the cache, launches counted where the host is late) or "clock" (processor)
    """

    median: float
    low: float
    high: float
    count: int
    how: str


def synchronize(device: torch.device | str) -> None:
    """Wait for the device; nothing to wait for on a processor."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def clocked(function: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of one call on the host's clock, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def sets(nbytes: int, device: torch.device | str) -> int:
    """How many sets of inputs of `nbytes` to use in turn, so that the cache never holds the one that comes next."""
    if torch.device(device).type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(CACHES * cache / max(1, nbytes))))


def measure(
    calls: Sequence[Callable[[], object]], device: torch.device | str, *, seconds: float = 0.25, graph: bool = False
) -> Times:
    """Time calls that do the same work on different inputs, in turn; the time is that of one call.

    seconds: spent on timing, more or less      graph: on a GPU, capture all calls into one graph and time its replays;
    for kernels shorter than their launch. Falls back to events where a call cannot be captured.
    """
    for call in calls:  # compilation, allocation, handles
        call()
    synchronize(device)
    if torch.device(device).type != "cuda":
        samples = _samples(lambda i: timed(calls[i % len(calls)]), seconds)
        return _summary(samples, "clock")
    replay = capture(calls, device) if graph else None
    if replay is not None:
        samples = _samples(lambda i: _between_events(replay, device) / len(calls), seconds)
        return _summary(samples, "graph")
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    filler = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def sample(index: int) -> float:
        filler.zero_()
        return _between_events(calls[index % len(calls)], device)

    return _summary(_samples(sample, seconds), "events")


def capture(calls: Sequence[Callable[[], object]], device: torch.device | str) -> Callable[[], None] | None:
    """Replay of all calls as one CUDA graph, or None where one of them cannot be captured (it waits for the device)."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay


def _between_events(call: Callable[[], object], device: torch.device | str) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _samples(sample: Callable[[int], float], seconds: float) -> list[float]:
    """At least LEAST samples, at most MOST, until `seconds` have passed."""
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < LEAST or (len(found) < MOST and time.perf_counter() - begin < seconds):
        found.append(sample(len(found)))
    return found


def _summary(samples: list[float], how: str) -> Times:
    return Times(median(samples), percentile(samples, 0.1), percentile(samples, 0.9), len(samples), how)
