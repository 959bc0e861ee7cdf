"""Command line of the training: `python -m cfengine.training train --out DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from cfengine.config import preset
from cfengine.errors import CFEngineError
from cfengine.training.recipe import Effort, Log, averaged, train, write_weights


def main() -> int:
    """Parse, train or export, and say where the weights are."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("train", help="run the whole recipe; finished stages are skipped, others go on")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--processes", type=int, default=2, help="one for each core")
    for name, default in Effort()._asdict().items():
        run.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    dump = commands.add_parser("export", help="write the averaged weights of an unfinished stage")
    dump.add_argument("state", type=Path)
    dump.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "export":
            world, step = averaged(options.state, preset("tiny-world"))
            options.folder.mkdir(parents=True, exist_ok=True)
            write_weights(world, options.folder)
            sys.stderr.write(f"weights of step {step} are in {options.folder}\n")
            return 0
        torch.set_num_threads(options.processes)
        options.out.mkdir(parents=True, exist_ok=True)
        effort = Effort(*(getattr(options, name) for name in Effort._fields))
        folder = train(options.out, options.seed, effort, Log(options.out / "log.jsonl"), processes=options.processes)
        sys.stderr.write(f"weights are in {folder}\n")
        return 0
    except CFEngineError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
