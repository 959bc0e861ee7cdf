"""Cost of length: a stream of 2,000 latent frames at tiny size, its time per chunk, its pages and its process memory.

    python -m cfengine.bench.length [--json FILE] [--frames N] [--threads N]

Random weights, but all of a stream's parts: a session of an engine with a decoder, and a memory that promotes and
rolls. Exit code 1 where a stream gets slower, or larger, with its length.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from cfengine.bench.records import record, write
from cfengine.bench.synthetic import RandomText, describe, random_weights
from cfengine.codec.tiny_world import TinyWorldCodec
from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.engine import Engine
from cfengine.errors import CFEngineError, ConfigError
from cfengine.model.dit import CausalDiT

SIZES = EngineConfig(
    name="bench-length",
    model=ModelConfig(dim=64, ffn_dim=128, heads=2, layers=2, text_dim=32, text_len=16, freq_dim=32),
    memory=MemoryConfig(),
    video=VideoConfig(width=64, height=48),
    codec="tiny_world",
)
EARLY = slice(50, 150)  # chunks; by then the memory has been full for long
LATE = slice(-100, None)
TIME_LIMIT = 1.5  # late over early; the rest is other work on the machine
# Everything is allocated once; the allocator's slack moves by half a MiB. Keeping one latent per frame would add 5 MiB
# over 1,800 frames at this size, one page 21, the pixels 60.
RSS_LIMIT_MIB = 4.0


@dataclass(frozen=True)
class LengthResult:
    """chunk_seconds: time between the arrivals of chunks      *_bytes: at 10 % and at 100 % of the stream."""

    chunk_seconds: list[float]
    pool_bytes: tuple[int, int]
    rss_bytes: tuple[int, int]

    @property
    def early(self) -> float:
        return median(self.chunk_seconds[EARLY])

    @property
    def late(self) -> float:
        return median(self.chunk_seconds[LATE])

    @property
    def rss_growth_mib(self) -> float:
        return (self.rss_bytes[1] - self.rss_bytes[0]) / 2**20


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_engine(config: EngineConfig) -> Engine:
    """An engine of random weights."""
    torch.manual_seed(0)
    model = CausalDiT(config.model)
    model.load_state_dict(random_weights(config.model))
    return Engine(config, model, TinyWorldCodec(), RandomText(config.model.text_dim))


def stream(frames: int, config: EngineConfig = SIZES, clock: Callable[[], float] = time.perf_counter) -> LengthResult:
    """Stream `frames` latent frames and watch time and memory; ConfigError when too short to compare early and late.

    clock: time.process_time counts this process's work alone, for a machine that others use too
    """
    chunks = frames // config.memory.chunk_frames
    if chunks < EARLY.stop - LATE.start:
        raise ConfigError(
            f"{frames} latent frames are {chunks} chunks; comparing chunks {EARLY.start} to {EARLY.stop} with the last "
            f"{-LATE.start} takes {EARLY.stop - LATE.start}; set --frames to at least "
            f"{(EARLY.stop - LATE.start) * config.memory.chunk_frames}"
        )
    arrivals = [clock()]
    pool, rss = [], []
    with make_engine(config) as engine, engine.session("anything") as session:
        while len(arrivals) <= chunks:
            session.next_chunk()
            arrivals.append(clock())
            if len(arrivals) - 1 in (chunks // 10, chunks):
                pool.append(session.memory.bytes)
                rss.append(rss_bytes())
    seconds = [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]
    return LengthResult(seconds, (pool[0], pool[1]), (rss[0], rss[1]))


def check(result: LengthResult) -> None:
    """Raise CFEngineError where time or memory grows with length."""
    ratio, growth = result.late / result.early, result.rss_growth_mib
    if result.pool_bytes[0] != result.pool_bytes[1]:
        raise CFEngineError(f"the pool grew from {result.pool_bytes[0]} to {result.pool_bytes[1]} bytes; pages leak")
    if ratio > TIME_LIMIT:
        raise CFEngineError(
            f"the last chunks take {ratio:.2f} times as long as chunks {EARLY.start} to {EARLY.stop} "
            f"(limit {TIME_LIMIT}); something grows with the stream, or the machine was busy: run it again"
        )
    if growth > RSS_LIMIT_MIB:
        raise CFEngineError(
            f"the process grew by {growth:.1f} MiB between 10 % and 100 % of the stream (limit {RSS_LIMIT_MIB:g}); "
            "something is kept per chunk"
        )


def records(result: LengthResult, config: EngineConfig = SIZES) -> list[dict]:
    """Time ratio and growth of the process as bench records."""
    shape = describe(
        config,
        latent_frames=len(result.chunk_seconds) * config.memory.chunk_frames,
        early_chunk_seconds=result.early,
        late_chunk_seconds=result.late,
        pool_bytes=result.pool_bytes,
        rss_mib=[size / 2**20 for size in result.rss_bytes],
    )
    ratio = result.late / result.early
    against = f"chunks {EARLY.start} to {EARLY.stop}"
    return [
        record("length_chunk_time_ratio", ratio, "x", against, ratio, shape),
        record("length_rss_growth_mib", result.rss_growth_mib, "MiB", "RSS at 10 % of the stream", None, shape),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.bench.length", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--frames", type=int, default=2000, help="latent frames")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        if options.json:
            write(options.json, [])  # a place that cannot be written to is named before the work
        result = stream(options.frames)
        found = records(result)
        for entry in found:
            sys.stdout.write(f"{entry['name']:<28}{entry['value']:>10.4g} {entry['unit']}\n")
        rss = " and ".join(f"{size / 2**20:.1f}" for size in result.rss_bytes)
        sys.stdout.write(
            f"chunk {result.early * 1e3:.2f} ms early, {result.late * 1e3:.2f} ms late; at 10 % and at the end: "
            f"pool {result.pool_bytes[0]} and {result.pool_bytes[1]} bytes, RSS {rss} MiB\n"
        )
        if options.json:
            write(options.json, found)
        check(result)
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
