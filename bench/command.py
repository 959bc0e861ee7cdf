"""What the command lines of the GPU benches share: device, size, records, and errors as one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

import torch

from cfengine.bench.records import line, write
from cfengine.bench.synthetic import SIZES
from cfengine.errors import CFEngineError, ConfigError

Say = Callable[[str], None]


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Parser of `python -m cfengine.bench.<name>` with --device, --size and --json."""
    made = argparse.ArgumentParser(prog=f"python -m cfengine.bench.{name}", description=description)
    made.add_argument("--device", help="cuda, cuda:N or cpu; default: cuda where there is one")
    made.add_argument("--size", choices=list(SIZES), help="default: full on cuda, toy on cpu")
    made.add_argument("--json", metavar="FILE", help="write the records there")
    return made


def settle(options: argparse.Namespace) -> None:
    """Fill in device and size; ConfigError for a device that is not there."""
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(options.device).type
    except RuntimeError:
        kind = options.device
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {options.device!r}; choose cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"torch {torch.__version__} finds no CUDA device; run with --device cpu --size toy")
    if options.size is None:
        options.size = "full" if kind == "cuda" else "toy"


def several(text: str, known: tuple[str, ...], what: str) -> list[str]:
    """Split "a,b" and check each; ConfigError names the known ones."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
    return names


def run(
    options: argparse.Namespace, work: Callable[[argparse.Namespace, Say], Iterable[list[dict]]], *, show: bool = True
) -> int:
    """Run a bench, print its records last (`show`) and return the exit code.

    --json is written after every list of records, so that a run that is cut off leaves what it has.
    """
    found: list[dict] = []
    try:
        settle(options)
        if options.json:
            write(options.json, [])  # a place that cannot be written to is named before the work
        for more in work(options, say):
            found += more
            if options.json:
                write(options.json, found)
        if show:
            say("\n".join(map(line, found)))
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
