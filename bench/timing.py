"""Wall-clock of one call, the machine's GEMM rate, and the distance between two results."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from cfengine.config import EngineConfig


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
