"""Typed functions and one table: the only door to kernels.

`select(device)` picks an implementation of every operation once, when an engine is built. Asking for one that is not
built raises an error that says how to build it; where nothing was asked for, an engine warns of what it went without.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cfengine.errors import KernelError

HINTS = {
    "cpu": "build the extension with a C++ compiler and cmake present: pip install -e .",
    "triton": "pip install triton",
}


class Candidate(NamedTuple):
    """One implementation of an operation on a device type; the first available one of a row is chosen."""

    name: str
    module: str


# (operation, device type) -> implementations, best first. `reference` runs everywhere torch does.
TABLE: dict[tuple[str, str], tuple[Candidate, ...]] = {
    (op, device): (
        Candidate(best, f"cfengine.kernels.{op}.{best}"),
        Candidate("reference", f"cfengine.kernels.{op}.reference"),
    )
    for op in ("paged_attention", "qk_norm_rope_store", "modulated_norm", "gated_residual", "slow_fast_update")
    for device, best in (("cpu", "cpu"), ("cuda", "triton"))
} | {("cross_attention", "cpu"): (Candidate("reference", "cfengine.kernels.cross_attention.reference"),)}

OPERATIONS = tuple(op for op, device in TABLE if device == "cpu")


@dataclass(frozen=True)
class Ops:
    """The chosen callables; signatures and meaning are those of `cfengine.kernels.<op>.reference`."""

    paged_attention: Callable[..., Any]
    qk_norm_rope_store: Callable[..., Any]
    modulated_norm: Callable[..., Any]
    gated_residual: Callable[..., Any]
    slow_fast_update: Callable[..., Any]
    cross_attention: Callable[..., Any]
    names: Mapping[str, str]  # operation -> implementation that serves it


def row(op: str, device: str) -> tuple[Candidate, ...]:
    """Candidates for `op` on a device type; only the reference where nothing else is listed."""
    return TABLE.get((op, device), (Candidate("reference", f"cfengine.kernels.{op}.reference"),))


def load(op: str, candidate: Candidate) -> Callable[..., Any]:
    """Import the callable of a candidate; KernelError names what is missing and how to get it."""
    try:
        return getattr(importlib.import_module(candidate.module), op)
    except ImportError as error:
        hint = HINTS.get(candidate.name, HINTS["cpu"])
        raise KernelError(f"{op}: implementation {candidate.name!r} is not available ({error}); {hint}") from error


def select(device: str = "cpu", choices: Mapping[str, str] | None = None, prefer: str | None = None) -> Ops:
    """Choose one implementation per operation for a device type ("cpu", "cuda").

    choices: operation -> implementation name that must be used      prefer: implementation to use wherever the
    operation has one of that name (an error if it has one that is not built)
    """
    choices = dict(choices or {})
    unknown = set(choices) - set(OPERATIONS)
    if unknown:
        raise KernelError(f"unknown operation {sorted(unknown)[0]!r}; known: {', '.join(OPERATIONS)}")
    functions, names = {}, {}
    for op in OPERATIONS:
        candidates = row(op, device)
        listed = [c.name for c in candidates]
        wanted = choices.get(op) or (prefer if prefer in listed else None)
        if wanted is not None and wanted not in listed:
            raise KernelError(f"{op} has no implementation {wanted!r} on {device}; known: {', '.join(listed)}")
        if wanted is not None:
            candidate = candidates[listed.index(wanted)]
            functions[op], names[op] = load(op, candidate), candidate.name
            continue
        failure = None
        for candidate in candidates:
            try:
                functions[op], names[op] = load(op, candidate), candidate.name
                break
            except KernelError as error:
                failure = error
        else:
            raise failure or KernelError(f"{op} has no implementation on {device}")
    return Ops(**functions, names=names)


def not_built(device: str, names: Mapping[str, str]) -> list[str]:
    """Operations of `names` that have a better implementation than the one chosen, one that does not load."""
    missing = []
    for op, name in names.items():
        best = row(op, device)[0]
        if best.name != name:
            try:
                load(op, best)
            except KernelError:
                missing.append(op)
    return missing


def implementations(device: str = "cpu") -> list[str]:
    """Names of implementations that at least one operation has on a device type and that load, best first."""
    found: dict[str, None] = {}
    for op in OPERATIONS:
        for candidate in row(op, device):
            try:
                load(op, candidate)
            except KernelError:
                continue
            found[candidate.name] = None
    return list(found)


def choices(device: str = "cpu") -> dict[str, list[tuple[str, bool, str]]]:
    """operation -> [(implementation, available, reason when not)], best first, as `cfengine doctor` prints it."""
    table: dict[str, list[tuple[str, bool, str]]] = {}
    for op in OPERATIONS:
        table[op] = []
        for candidate in row(op, device):
            try:
                load(op, candidate)
                table[op].append((candidate.name, True, ""))
            except KernelError as error:
                table[op].append((candidate.name, False, str(error)))
    return table
