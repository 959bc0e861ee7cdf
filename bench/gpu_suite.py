"""Every GPU test and bench in one command, the most important first, in under nine minutes.

    python -m cfengine.bench.gpu_suite --out DIR [--seconds N] [--only PART,...] [--list]

Runs from a checkout where nothing is installed but torch, triton, numpy, safetensors and pytest; the first part builds
the compiled kernels where CMake and a compiler are found. Every part is a process of its own with a budget; one that
fails or hangs is stopped and the rest goes on. DIR receives at most MOST_FILES files: the records as
`<gpu>-<date>.json`, rewritten after every part, `log.txt`, and plots. A short table comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

from cfengine.bench.records import device_name, line, record, write
from cfengine.errors import CFEngineError, ConfigError

ROOT = Path(__file__).resolve().parent.parent
MOST_FILES = 8
MINUTES = 9.0
LEAST = 10.0  # seconds left below which a part is not begun
CALM = 5.0  # seconds between asking a part to end and ending it
SHOWN = (
    r"stream_fps_|chunk_p99|first_frame_seconds|peak_memory|flow_error|engine_vs_baseline|roofline_|ceiling_|"
    r"kernel_paged_attention_\d+_slots"
)


class Part(NamedTuple):
    """One process. records: takes --json FILE      plot: takes --plot FILE of that name."""

    name: str
    command: list[str]
    budget: float
    records: bool = True
    plot: str = ""


class Outcome(NamedTuple):
    """status: ok, failed, timeout or skipped."""

    part: Part
    status: str
    seconds: float
    code: int | None
    last: str


def bench(name: str, *words: str) -> list[str]:
    """Command of a bench."""
    return [sys.executable, "-m", f"cfengine.bench.{name}", *words]


def gpu_tests() -> list[str]:
    """Files with tests for a GPU, kernels first."""
    found = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8")]
    return [str(p.relative_to(ROOT)) for p in sorted(found, key=lambda p: ("kernels" not in p.parts, str(p)))]


def parts(seconds: float) -> list[Part]:
    """All parts in order of importance; seconds: sustained, of a stream."""
    calm, length = ["--seconds", "0.15"], f"{seconds:g}"
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    pytest.append("--continue-on-collection-errors")  # a file that fails to load takes no other with it
    return [
        Part("build", bench("build"), 170),
        Part("tests", [*pytest, *gpu_tests()], 80, records=False),
        Part("attention", bench("kernels", "--op", "paged_attention", *calm), 40),
        Part("stream_bf16", bench("stream", "--precision", "bf16", "--seconds", length), 60 + seconds),
        Part(
            "stream_fp8", bench("stream", "--precision", "fp8", "--against", "bf16", "--seconds", length), 70 + seconds
        ),
        Part("baseline", bench("baseline", "--precision", "bf16,fp8", "--rounds", "3"), 55),
        Part("roofline", bench("roofline", "--precision", "bf16,fp8", *calm), 50, plot="roofline.png"),
        Part("kernels", bench("kernels", "--skip", "paged_attention", *calm), 50, plot="kernels.png"),
        Part("profile", bench("profile", "--precision", "bf16"), 30),
        Part(
            "policies",
            bench("stream", "--policy", "fifo,sink_window,relative_window,slow_fast_paper,uniform", "--seconds", "6"),
            90,
        ),
        Part("segments", bench("segments", "--layers", "4"), 100),  # cut short: 30 layers take minutes to export
        Part("two_sessions", bench("stream", "--sessions", "2", "--seconds", "8", "--check-chunks", "0"), 40),
    ]


def run_part(part: Part, log: Path, folder: Path, out: Path, budget: float) -> tuple[Outcome, list[dict]]:
    """Run a part within `budget` seconds, its output in the log; -> what became of it, and its records."""
    words, saved = list(part.command), folder / f"{part.name}.json"
    words += ["--json", str(saved)] if part.records else []
    words += ["--plot", str(out / part.plot)] if part.plot else []
    begin = time.perf_counter()
    with log.open("a+b") as text:
        text.write(f"\n===== {part.name}, at most {budget:.0f} s: {' '.join(words)}\n".encode())
        text.flush()
        place = text.tell()
        process = subprocess.Popen(words, cwd=ROOT, stdout=text, stderr=text, start_new_session=True)
        try:
            code: int | None = process.wait(budget)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "timeout"
        finally:
            end(process)
        text.seek(place)
        lines = text.read().decode(errors="replace").strip().splitlines()
    seconds = time.perf_counter() - begin
    return Outcome(part, status, seconds, code, lines[-1] if lines else ""), load(saved)


def end(process: subprocess.Popen) -> None:
    """End a part and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(CALM)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def load(path: Path) -> list[dict]:
    """Records that a part has written; none where it did not get that far."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def suite_record(outcome: Outcome) -> dict:
    """What became of a part, as a record."""
    shape = {"status": outcome.status, "exit_code": outcome.code, "last_line": outcome.last}
    return record(f"suite_{outcome.part.name}", outcome.seconds, "s", config=shape)


def results_name() -> str:
    """`h200-20261125.json` for an NVIDIA H200, `cpu-...` without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return f"cpu-{date.today():%Y%m%d}.json"
    words = [word for word in device_name().lower().split() if word not in ("nvidia", "geforce", "tesla")]
    return f"{re.sub(r'[^a-z0-9]+', '', words[0] if words else 'gpu')}-{date.today():%Y%m%d}.json"


def run(wanted: list[Part], out: Path, minutes: float, commit: str | None, say) -> list[Outcome]:
    """Run the parts while time lasts; records are written after each."""
    end_at = time.monotonic() + 60 * minutes
    log, results = out / "log.txt", out / results_name()
    log.write_text("")
    found, outcomes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for part in wanted:
            left = end_at - time.monotonic() - 2 * CALM
            if left < LEAST:
                outcome, made = Outcome(part, "skipped", 0.0, None, f"{max(0.0, left):.0f} s were left"), []
            else:
                outcome, made = run_part(part, log, Path(folder), out, min(left, part.budget))
            outcomes.append(outcome)
            found += [*made, suite_record(outcome)]
            for entry in found:
                entry["commit"] = commit or entry["commit"]
            write(results, found)
            say(f"{part.name:<14}{outcome.status:<9}{outcome.seconds:6.1f} s   {outcome.last[:90]}")
    say("\n" + "\n".join(line(entry) for entry in found if re.match(SHOWN, entry["name"])))
    say("\n" + summary(outcomes) + f"\n{results}")
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    """One line: how many parts ended how."""
    counts = {status: sum(o.status == status for o in outcomes) for status in ("ok", "failed", "timeout", "skipped")}
    bad = ", ".join(f"{o.part.name} {o.status}" for o in outcomes if o.status != "ok")
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n) + (f" ({bad})" if bad else "")


def choose(known: list[Part], only: str | None) -> list[Part]:
    """The parts that --only names, in the suite's order; ConfigError for an unknown one."""
    if only is None:
        return known
    names = [name for name in only.split(",") if name]
    for name in names:
        if name not in [part.name for part in known]:
            raise ConfigError(f"unknown part {name!r}; choose from {', '.join(part.name for part in known)}")
    return [part for part in known if part.name in names]


def prepare(out: Path) -> None:
    """Make the folder; ConfigError where its files and the suite's would be too many."""
    out.mkdir(parents=True, exist_ok=True)
    plots = {part.plot for part in parts(1) if part.plot}
    there = {path.name for path in out.iterdir()}
    total = len(there | plots | {"log.txt", results_name()})
    if total > MOST_FILES:
        raise ConfigError(f"{out} would hold {total} files, at most {MOST_FILES}; give an empty folder")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0 where every part ended well."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.bench.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the records, the log and the plots")
    parser.add_argument("--seconds", type=float, default=30.0, help="sustained, of a stream (the goals say 120)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--only", metavar="PARTS", help="some parts")
    parser.add_argument("--commit", help="commit to name where the checkout has no history")
    parser.add_argument("--list", action="store_true", help="list the parts and run none")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    try:
        wanted = choose(parts(options.seconds), options.only)
        if options.list or options.out is None:
            for part in wanted:
                say(f"{part.name:<14}at most {part.budget:4.0f} s   {' '.join(part.command)}")
            return 0
        prepare(options.out)
        outcomes = run(wanted, options.out.resolve(), options.minutes, options.commit, say)
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
