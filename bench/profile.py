"""Where a steady chunk's time goes: kernels by name, or the chunk that Nsight Systems and Nsight Compute are to see.

    python -m cfengine.bench.profile                             # torch's profiler: kernels, idle time
    python -m cfengine.bench.profile --tool nsys --out chunk     # writes chunk.nsys-rep
    python -m cfengine.bench.profile --tool ncu --out chunk --kernel 'regex:attention'
    python -m cfengine.bench.profile --tool range                # for a profiler of your own

A stream runs until its memory is full; the chunks after that lie between cudaProfilerStart and cudaProfilerStop. NVTX
ranges name chunk, pass, layers and operation; inside a captured graph the host runs once, so --eager launches every
kernel anew where names matter more than times.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from cfengine.bench import command
from cfengine.bench.command import Say
from cfengine.bench.records import record
from cfengine.bench.settings import PRECISIONS, Setting
from cfengine.bench.synthetic import describe
from cfengine.bench.timing import synchronize
from cfengine.engine import Engine
from cfengine.errors import CFEngineError, ConfigError
from cfengine.session import Session

TOOLS = ("torch", "nsys", "ncu", "range")
SHOWN = 15  # kernels in the table


def steady(engine: Engine) -> Session:
    """A session whose memory is full."""
    session = engine.session("anything", seed=0)
    for _ in range(engine.config.memory.slots // engine.config.memory.chunk_frames + 1):
        session.next_chunk()
    synchronize(engine.device)
    return session


def marked(engine: Engine, chunks: int) -> None:
    """Run chunks between cudaProfilerStart and cudaProfilerStop."""
    on_gpu = torch.device(engine.device).type == "cuda"
    with steady(engine) as session:
        if on_gpu:
            torch.cuda.profiler.start()
        for _ in range(chunks):
            session.next_chunk()
        synchronize(engine.device)
        if on_gpu:
            torch.cuda.profiler.stop()


def kernels(engine: Engine, chunks: int) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds of every kernel and copy on the device; of torch's calls on a processor."""
    on_gpu = torch.device(engine.device).type == "cuda"
    with steady(engine) as session:
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as watch:
            for _ in range(chunks):
                session.next_chunk()
            synchronize(engine.device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in watch.events() if e.device_type == wanted]
    return sorted(spans, key=lambda span: span[1])


def busy(spans: list[tuple[str, float, float]]) -> float:
    """Microseconds during which at least one of the spans ran; spans in order of their start."""
    total, end = 0.0, float("-inf")
    for _, start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def totals(spans: list[tuple[str, float, float]], chunks: int) -> dict[str, tuple[float, float]]:
    """Name -> (milliseconds, calls) a chunk, the longest first."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, start, stop in spans:
        found[name][0] += (stop - start) / 1e3 / chunks
        found[name][1] += 1 / chunks
    return {name: (ms, calls) for name, (ms, calls) in sorted(found.items(), key=lambda pair: -pair[1][0])}


def table(found: dict[str, tuple[float, float]]) -> str:
    """The kernels that take longest."""
    whole = sum(ms for ms, _ in found.values())
    lines = [f"{'ms a chunk':>11}{'calls':>8}{'share':>8}  kernel"]
    for name, (ms, calls) in list(found.items())[:SHOWN]:
        lines.append(f"{ms:>11.3f}{calls:>8.0f}{ms / whole:>8.1%}  {name[:90]}")
    return "\n".join(lines)


def by_name(setting: Setting, device: str, chunks: int, graphs: bool, say: Say) -> list[dict]:
    """Table of kernels, and the share of the time in which the device had nothing to do."""
    with torch.inference_mode(), setting.engine(device, graphs=graphs) as engine:
        spans = kernels(engine, chunks)
    if not spans:
        raise CFEngineError("the profiler saw no kernel; is CUPTI installed, and may this user read the counters?")
    found = totals(spans, chunks)
    say(table(found))
    whole = max(stop for *_, stop in spans) - spans[0][1]
    idle = 1 - busy(spans) / whole
    shape = describe(
        setting.config(),
        precision=setting.precision,
        size=setting.size,
        graphs=graphs,
        kernels={name: {"ms": ms, "calls": calls} for name, (ms, calls) in list(found.items())[: 3 * SHOWN]},
    )
    return [record(f"profile_idle_share_{setting.suffix}", idle, "share of the time", config=shape)]


def tool_command(options: argparse.Namespace) -> list[str]:
    """The profiler around this module; ConfigError where it is not installed."""
    again = [sys.executable, "-m", "cfengine.bench.profile", "--tool", "range", "--device", options.device]
    again += ["--size", options.size, "--precision", options.precision, "--chunks", str(options.chunks)]
    again += ["--eager"] if options.eager else []
    if options.tool == "nsys":
        watch = ["nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
        watch += ["--trace=cuda,nvtx,cublas", "--cuda-graph-trace=node", "--force-overwrite=true", "-o", options.out]
    else:
        watch = ["ncu", "--profile-from-start", "off", "--graph-profiling", "node", "--clock-control", "none"]
        watch += ["--set", "full", "--nvtx", "--launch-count", str(options.launches), "--force-overwrite"]
        watch += ["--kernel-name", options.kernel, "--export", options.out]
    if not options.dry_run and shutil.which(watch[0]) is None:
        raise ConfigError(f"{watch[0]} was not found; install NVIDIA {watch[0]}, or use --tool torch")
    return watch + again


def run(options: argparse.Namespace, say: Say) -> Iterator[list[dict]]:
    """Do what the tool asks for."""
    setting = Setting("slow_fast", options.precision, size=options.size)
    if options.tool == "torch":
        yield by_name(setting, options.device, options.chunks, not options.eager, say)
        return
    if options.tool == "range":
        with torch.inference_mode(), setting.engine(options.device, graphs=not options.eager) as engine:
            marked(engine, options.chunks)
        return
    words = tool_command(options)
    say(" ".join(words))
    if not options.dry_run and subprocess.run(words).returncode:
        raise CFEngineError(f"{words[0]} failed; its output above says why")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = command.parser("profile", __doc__.split("\n")[0])
    parser.add_argument("--tool", choices=TOOLS, default="torch")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="no graphs: kernels under the names of their operations")
    parser.add_argument("--out", default="chunk", help="report of nsys or ncu, without its ending")
    parser.add_argument("--kernel", default="regex:attention", help="kernels that ncu measures")
    parser.add_argument("--launches", type=int, default=8, help="kernels that ncu measures at most")
    parser.add_argument("--dry-run", action="store_true", help="print the command of nsys or ncu and run nothing")
    return command.run(parser.parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
