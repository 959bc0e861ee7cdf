"""Time to get at a frame of the ring, in microseconds, and to publish one.

    python -m cfengine.bench.ring [--json FILE] [--seconds S] [--fps N] [--width W] [--height H]

A second process publishes frames at `fps`. This one acquires the newest and releases it: `tight`, one after the other,
and `paced`, one every 2 ms with sleep in between, as a game does, so that others may have had the caches. A time is
that of cf_frame_acquire alone and of two calls of the clock around it. Nothing is copied, so size does not matter.
Publishing copies and converts a frame, here from RGB, in this process alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from statistics import median

import numpy as np

from cfengine.bench.command import say
from cfengine.bench.records import line, record, write
from cfengine.embed import Format, Ring, now_ns
from cfengine.embed.native import load
from cfengine.errors import CFEngineError, ConfigError

PERCENTILES = (50, 99, 99.9)
PACE_NS = 2_000_000
TIGHT = 100_000  # acquires a second of the run: far below what one core does
MOST_LEASE_NS = 60_000_000_000


def publish_until(stop, ready, name: str, width: int, height: int, fps: float) -> None:
    """Body of the writing process."""
    pixels = np.zeros((height, width, 3), np.uint8)
    with Ring(name, width, height, fps=fps) as ring:
        ring.publish(pixels)
        ready.set()
        due = now_ns()
        while not stop.is_set():
            due += round(1e9 / fps)
            time.sleep(max(0, due - now_ns()) / 1e9)
            ring.publish(pixels)


def acquire_records(seconds: float, width: int, height: int, fps: float) -> list[dict]:
    """Percentiles of both ways of reading while another process writes."""
    context = multiprocessing.get_context("spawn")
    stop, ready, name = context.Event(), context.Event(), f"bench-{os.getpid()}"
    writer = context.Process(target=publish_until, args=(stop, ready, name, width, height, fps), daemon=True)
    writer.start()
    try:
        while not ready.wait(0.1):
            if writer.exitcode is not None:
                raise CFEngineError(f"the writing process ended with {writer.exitcode}; its message is above")
        reader = load().RingReader(name, MOST_LEASE_NS)
        reader.time_acquires(1000, 0)
        ways = {"tight": (round(seconds * TIGHT), 0), "paced": (round(seconds * 1e9 / PACE_NS), PACE_NS)}
        found = []
        for way, (count, period) in ways.items():
            times = reader.time_acquires(max(count, 1), period) / 1e3
            config = {"width": width, "height": height, "fps": fps, "acquires": len(times), "period_us": period / 1e3}
            for share in PERCENTILES:
                found.append(
                    record(f"ring_acquire_{way}_p{share}", float(np.percentile(times, share)), "us", config=config)
                )
        reader.close()
    finally:
        stop.set()
        writer.join(10)
    return found


def publish_records(seconds: float, width: int, height: int) -> list[dict]:
    """Median time of publishing a frame, by format."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    found = []
    for kind in Format:
        with Ring(f"bench-{os.getpid()}", width, height, format=kind) as ring:
            times, end = [], now_ns() + seconds * 1e9
            while len(times) < 3 or now_ns() < end:
                start = now_ns()
                ring.publish(pixels)
                times.append((now_ns() - start) / 1e6)
        config = {"width": width, "height": height, "from": "rgb", "frames": len(times)}
        found.append(record(f"ring_publish_{kind.name.lower()}", median(times), "ms", config=config))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cfengine.bench.ring", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement, 5")
    parser.add_argument("--fps", type=float, default=16.0, help="rate of the writing process, 16")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    options = parser.parse_args(arguments)
    try:
        if options.seconds <= 0 or options.fps <= 0:
            raise ConfigError(f"--seconds {options.seconds} --fps {options.fps}: both must be positive")
        found = acquire_records(options.seconds, options.width, options.height, options.fps)
        found += publish_records(min(options.seconds, 1.0), options.width, options.height)
        if options.json:
            write(options.json, found)
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    say("\n".join(map(line, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
