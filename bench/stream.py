"""Speed of a live stream, whole and in parts, several policies and precisions in one run.

    python -m cfengine.bench.stream --precision bf16,fp8 --seconds 120 --json FILE
    python -m cfengine.bench.stream --size toy --device cpu --precision fp32,bf16 --seconds 2

The full-size model (832x480, 1.3 billion parameters) with random weights made on the device, a random prompt embedding
and a decoder of random weights. A pass is first compared with the plain torch operations; then chunks are streamed with
a full memory. A period is the time between two chunks' arrivals at the consumer as pixels in host memory: it holds the
denoise passes, the clean pass, the decoder and the copy, whatever overlaps.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch

from cfengine.batch import Batch
from cfengine.bench import command
from cfengine.bench.check import against_reference, flow_error
from cfengine.bench.command import Say, several
from cfengine.bench.records import record
from cfengine.bench.settings import DECODERS, PRECISIONS, Setting, resolution
from cfengine.bench.synthetic import describe
from cfengine.bench.timing import percentile, synchronize
from cfengine.config import POLICIES
from cfengine.engine import Engine
from cfengine.errors import ConfigError
from cfengine.types import ChunkTimings

FILL_LIMIT = 100  # chunks; slow memory of the paper's rule gains at most one page every other chunk
FIRST_FRAMES = 3  # sessions opened to time the first frame
LEAST_CHUNKS = 4
FIRST = "a prompt's keys and values, noise, denoise passes, decoder and copy, on a session that is open"
OPENING = (
    "a prompt's keys and values, and pages; on a GPU on a lane that closed sessions left, the first of all aside, "
    "which compiles kernels and captures the graphs"
)


@dataclass
class Streamed:
    """What was seen.

    periods, frames: of every round of chunks, one a session      sessions: that a round serves
    first: (opening, first frame) of new sessions
    slots: in use in the emptiest layer, and there are      error: against the reference
    """

    periods: list[float]
    timings: list[ChunkTimings]
    frames: int
    sessions: int
    first: list[tuple[float, float]]
    slots: tuple[int, int]
    peak: dict[str, float]
    error: float | None
    implementations: dict[str, str]

    @property
    def fps(self) -> float:
        """Frames of all sessions over the time from the first arrival to the last."""
        return self.frames / sum(self.periods)

    @property
    def fps_each(self) -> float:
        """Frames of one session over the same time; sessions in lock-step give equally many."""
        return self.fps / self.sessions

    @property
    def opening(self) -> float:
        """Median seconds to open sessions where others have closed."""
        return median(opening for opening, _ in self.first[1:])

    @property
    def first_frame(self) -> float:
        """Median seconds to the first frame; the first session is warm-up."""
        return median(seconds for _, seconds in self.first[1:])

    def part(self, name: str) -> float:
        """Median milliseconds of a part of a chunk."""
        return 1e3 * median(getattr(timing, name) for timing in self.timings)


def first_frame(engine: Engine, sessions: int) -> tuple[float, float]:
    """(seconds to open sessions, seconds from their embedded prompts to the first frames of all in host memory).

    Opening allocates pages and captures graphs, where no closed sessions have left theirs; the prompts come to sessions
    that are open, and their keys and values count.
    """
    opened = time.perf_counter()
    unseen = time.perf_counter_ns()  # an engine keeps what it has made of prompts lately used
    with engine.batch([f"anything {unseen}"] * sessions) as batch:
        synchronize(engine.device)
        begin = time.perf_counter()
        for place, session in enumerate(batch.sessions):
            session.set_prompt(f"something else {unseen} {place}")
        batch.next_chunk()
        return begin - opened, time.perf_counter() - begin


def fill(batch: Batch) -> tuple[int, int]:
    """Stream until every layer's memory is full, at most FILL_LIMIT chunks; -> slots in use in the emptiest, slots."""
    config = batch.sessions[0].config
    for _ in range(FILL_LIMIT):
        batch.next_chunk()
        synchronize(batch.sessions[0].memory.device)  # the clean pass still changes tables
        memories = [session.memory for session in batch.sessions]
        used = min(memory.slots_in_use(layer) for memory in memories for layer in range(config.model.layers))
        if used >= config.memory.slots:
            break
    return used, config.memory.slots


def peak_memory(device: torch.device | str) -> dict[str, float]:
    """GB at the highest: allocated by tensors, reserved by torch; on a processor the process's resident memory."""
    if torch.device(device).type != "cuda":
        return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "reserved": torch.cuda.max_memory_reserved(device) / 1e9,
        "allocated": torch.cuda.max_memory_allocated(device) / 1e9,
        "device_in_use": (total - free) / 1e9,  # the driver's context and other processes too
    }


def forget_peak(device: torch.device | str) -> None:
    """Give unused memory back and count the peak from here."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def stream(setting: Setting, device: str, seconds: float, check_chunks: int) -> Streamed:
    """Build, check, and stream for `seconds` after the memory has filled."""
    with setting.engine(device) as engine:
        error = against_reference(engine, setting.precision, check_chunks) if check_chunks else None
        forget_peak(device)
        first = [first_frame(engine, setting.sessions) for _ in range(FIRST_FRAMES)]
        with engine.batch(["anything"] * setting.sessions) as batch:
            slots = fill(batch)
            periods, timings, frames = arrivals(batch, seconds)
        seen = periods, timings, frames, setting.sessions, first, slots
        return Streamed(*seen, peak_memory(device), error, engine.implementations())


def arrivals(batch: Batch, seconds: float) -> tuple[list[float], list[ChunkTimings], int]:
    """Periods of rounds of chunks for `seconds`, the first session's timings, and the frames of all."""
    periods, timings, frames = [], [], 0
    batch.next_chunk()
    last = begin = time.perf_counter()
    while last - begin < seconds or len(periods) < LEAST_CHUNKS:
        chunks = batch.next_chunk()
        now = time.perf_counter()
        periods.append(now - last)
        timings.append(chunks[0][0].timings)
        frames += sum(map(len, chunks))
        last = now
    return periods, timings, frames


def shape_of(setting: Setting, seen: Streamed) -> dict:
    """What every record of a stream says."""
    config = setting.config()
    return describe(
        config,
        size=setting.size,
        precision=setting.precision,
        policy=setting.policy,
        decoder=setting.decoder,
        sessions=setting.sessions,
        fps_each_session=seen.fps_each,
        width=config.video.width,
        height=config.video.height,
        denoise_passes=len(config.sampler.steps),
        clean_passes=1,
        slots_in_context=seen.slots[0],
        sustained_seconds=sum(seen.periods),
        chunks=len(seen.periods),
        includes="denoise passes, clean pass, decoder, copy to host memory",
        check_error=seen.error,
        implementations=seen.implementations,
    )


def records(setting: Setting, seen: Streamed) -> list[dict]:
    """Frames per second, ms per chunk and its parts, regularity, first frame, memory."""
    shape, suffix = shape_of(setting, seen), setting.suffix
    middle = median(seen.periods)
    tail = {f"p{round(100 * q)}_ms": 1e3 * percentile(seen.periods, q) for q in (0.5, 0.95, 0.99)}
    parts = {f"{name}_ms": seen.part(name) for name in ("denoise", "clean", "decode")}
    regular = percentile(seen.periods, 0.99) / middle
    plain = suffix.removeprefix("bf16").removeprefix("_")
    main = next(iter(seen.peak))
    firsts = {"sessions_opened": [{"open": opening, "first_frame": seconds} for opening, seconds in seen.first]}
    return [
        record(f"stream_fps_{suffix}", seen.fps, "frames/s", config=shape | tail | parts),
        record(f"stream_chunk_ms_{suffix}", 1e3 * middle, "ms", config=shape | tail | parts),
        # the goal's name is that of the exact engine in its usual setting
        record("_".join(filter(None, ("chunk_p99_over_p50", plain))), regular, "x", config=shape | tail),
        record(f"first_frame_seconds_{suffix}", seen.first_frame, "s", config=shape | {"includes": FIRST, **firsts}),
        record(f"session_open_seconds_{suffix}", seen.opening, "s", config=shape | {"includes": OPENING, **firsts}),
        record(f"peak_memory_gb_{suffix}", seen.peak[main], "GB", config=shape | {"counts": main} | seen.peak),
    ]


def several_sessions(seen: Streamed) -> str:
    """How many sessions the frames belong to."""
    return "1 session" if seen.sessions == 1 else f"{seen.sessions} sessions of {seen.fps_each:.2f} each"


def sentence(setting: Setting, seen: Streamed) -> str:
    """What a number of frames per second means."""
    config = setting.config()
    used, slots = seen.slots
    return (
        f"{setting.precision}, {setting.policy}: {seen.fps:.2f} frames/s over the whole period for "
        f"{sum(seen.periods):.0f} s ({config.video.width}x{config.video.height}, {used} of {slots} slots in context, "
        f"{len(config.sampler.steps)} denoise passes and the clean pass, decoder {setting.decoder}, copy to the host, "
        f"{several_sessions(seen)})\n"
        f"    chunk {1e3 * median(seen.periods):.1f} ms: denoise {seen.part('denoise'):.1f}, clean "
        f"{seen.part('clean'):.1f}, decode {seen.part('decode'):.1f} (parts may overlap); p95 "
        f"{1e3 * percentile(seen.periods, 0.95):.1f}, p99 {1e3 * percentile(seen.periods, 0.99):.1f}\n"
        f"    first frame {seen.first_frame:.3f} s after the prompt is embedded, on a session opened in "
        f"{seen.opening:.2f} s; peak memory {next(iter(seen.peak.values())):.2f} GB"
    )


def flow_records(settings: list[Setting], options: argparse.Namespace) -> Iterator[list[dict]]:
    """Errors of precisions under the first policy, against --against or the first precision."""
    first = settings[0]
    exact = replace(first, precision=options.against or first.precision, sessions=1)
    others = [s for s in settings if s.policy == first.policy and s.precision != exact.precision]
    for other in others:
        yield [flow_record(exact, other, options.device, options.flow_chunks)]


def flow_record(exact: Setting, other: Setting, device: str, chunks: int) -> dict:
    """Record `<precision>_flow_error`: the worst denoise pass, teacher-forced."""
    with exact.engine(device) as teacher, other.engine(device) as student:
        found = flow_error(teacher, student, chunks)
    shape = describe(other.config(), size=other.size, precision=other.precision, policy=other.policy, **found)
    against = f"{exact.precision}, teacher-forced"
    name = f"{other.precision}_flow_error" + ("_toy" if other.size == "toy" else "")
    return record(name, found["rms"], "share of the flow's deviation", against, None, shape)


def run(options: argparse.Namespace, say: Say) -> Iterator[list[dict]]:
    """Time every setting, then compare the precisions."""
    settings = settings_of(options)
    for setting in settings:
        seen = stream(setting, options.device, options.seconds, options.check_chunks)
        say(sentence(setting, seen))
        yield records(setting, seen)
        forget_peak(options.device)
    yield from flow_records(settings, options)


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """Policies x precisions."""
    if options.sessions < 1:
        raise ConfigError(f"--sessions is {options.sessions}; it must be at least 1")
    policies = several(options.policy, POLICIES, "policy")
    precisions = several(options.precision, PRECISIONS, "precision")
    shared = options.decoder, options.sessions, options.size, resolution(options.resolution)
    return [Setting(*pair, *shared) for pair in itertools.product(policies, precisions)]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = command.parser("stream", __doc__.split("\n")[0])
    parser.add_argument("--policy", default="slow_fast", help=f"one or several of {', '.join(POLICIES)}")
    parser.add_argument("--precision", default="bf16", help=f"one or several of {', '.join(PRECISIONS)}")
    parser.add_argument("--decoder", choices=DECODERS, default=DECODERS[0])
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--resolution", metavar="WxH", help="832x480 at full size")
    parser.add_argument("--seconds", type=float, default=120.0, help="sustained, of the clock, a setting")
    parser.add_argument("--check-chunks", type=int, default=2, help="compared with the reference; 0 checks nothing")
    parser.add_argument("--against", choices=PRECISIONS, help="what flows are compared with; default: the first")
    parser.add_argument("--flow-chunks", type=int, default=8, help="over which precisions are compared")
    return command.run(parser.parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
