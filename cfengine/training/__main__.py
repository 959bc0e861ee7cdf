"""Command line of the training: `python -m cfengine.training train --out DIR`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from cfengine.config import preset
from cfengine.errors import CFEngineError
from cfengine.training.recipe import Effort, export_average, train


class Log:
    """One line a report on standard error, and the same as JSON lines in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.begun = path, time.monotonic()

    def __call__(self, stage: str, values: dict) -> None:
        seconds = time.monotonic() - self.begun
        words = " ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        sys.stderr.write(f"{seconds:8.1f} s  {stage:7s} {words}\n")
        sys.stderr.flush()
        with self.path.open("a") as file:
            file.write(json.dumps({"seconds": round(seconds, 1), "stage": stage, **values}) + "\n")


def main() -> int:
    """Parse, train or export, and say where the weights are."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("train", help="run the whole recipe; finished stages are skipped, others go on")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--threads", type=int, default=2)
    for name, default in Effort()._asdict().items():
        run.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    dump = commands.add_parser("export", help="write the averaged weights of an unfinished stage")
    dump.add_argument("state", type=Path)
    dump.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "export":
            step = export_average(options.state, preset("tiny-world"), options.folder)
            sys.stderr.write(f"weights of step {step} are in {options.folder}\n")
            return 0
        torch.set_num_threads(options.threads)
        options.out.mkdir(parents=True, exist_ok=True)
        effort = Effort(*(getattr(options, name) for name in Effort._fields))
        folder = train(options.out, options.seed, effort, Log(options.out / "log.jsonl"))
        sys.stderr.write(f"weights are in {folder}\n")
        return 0
    except CFEngineError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
