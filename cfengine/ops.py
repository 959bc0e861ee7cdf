"""Typed functions and one table: the only door to kernels.

`select(device)` picks an implementation of every operation once, when an engine is built. Asking for one that is not
built raises an error that says how to build it; where nothing was asked for, an engine warns where plain torch serves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cfengine.errors import KernelError

HINTS = {
    "cpu": "build the extension with a C++ compiler and cmake present: pip install -e .",
    "cuda": "build the extension with nvcc 12.4 or later on PATH: pip install -e .",
    "triton": "pip install triton",
}


class Candidate(NamedTuple):
    """One implementation of an operation on a device type; the first available one of a row is chosen."""

    name: str
    module: str
    fp8: bool = True  # takes and gives e4m3 where the operation has such operands
    captured: bool = True  # reads tables on the device, so that one captured CUDA graph serves every state of a memory


# operation -> device type -> implementations, best first, then `reference`, which runs everywhere torch does and so is
# the last one that is chosen unasked; `rounding` shows on any machine what fp8 tensor cores would round.
_BUILT: dict[str, dict[str, tuple[str, ...]]] = {
    "paged_attention": {"cpu": ("cpu", "reference", "rounding"), "cuda": ("cuda", "triton", "sdpa")},
    "qk_norm_rope_store": {"cpu": ("cpu",), "cuda": ("triton",)},
    "modulated_norm": {"cpu": ("cpu",), "cuda": ("triton",)},
    "gated_residual": {"cpu": ("cpu",), "cuda": ("triton",)},
    "slow_fast_update": {"cpu": ("cpu",), "cuda": ("triton",)},
    "slow_fast_paper_update": {"cuda": ("triton",)},
    "slow_fast_diverse_update": {"cuda": ("triton",)},
    "window_update": {"cuda": ("triton",)},
    "cross_attention": {"cuda": ("triton",)},
    "quantise_rows": {"cuda": ("triton",)},
    "linear_fp8": {"cuda": ("scaled_mm",)},
    "flow_to_x0": {"cuda": ("triton",)},
    "renoise": {"cuda": ("triton",)},
}
OPERATIONS = tuple(_BUILT)
_WIDE_ONLY = {(op, "cpu") for op in ("paged_attention", "qk_norm_rope_store", "modulated_norm", "gated_residual")}
_READ_BY_HOST = {("paged_attention", "rounding")} | {
    (op, "reference")
    for op in (
        "paged_attention",
        "qk_norm_rope_store",
        "slow_fast_update",
        "slow_fast_paper_update",
        "slow_fast_diverse_update",
        "window_update",
    )
}
TABLE: dict[tuple[str, str], tuple[Candidate, ...]] = {
    (op, device): tuple(
        Candidate(name, f"cfengine.kernels.{op}.{name}", (op, name) not in _WIDE_ONLY, (op, name) not in _READ_BY_HOST)
        for name in dict.fromkeys((*built.get(device, ()), "reference"))
    )
    for op, built in _BUILT.items()
    for device in ("cpu", "cuda")
}


@dataclass(frozen=True)
class Ops:
    """The chosen callables; signatures and meaning are those of `cfengine.kernels.<op>.reference`."""

    paged_attention: Callable[..., Any]
    qk_norm_rope_store: Callable[..., Any]
    modulated_norm: Callable[..., Any]
    gated_residual: Callable[..., Any]
    slow_fast_update: Callable[..., Any]
    slow_fast_paper_update: Callable[..., Any]
    slow_fast_diverse_update: Callable[..., Any]
    window_update: Callable[..., Any]
    cross_attention: Callable[..., Any]
    quantise_rows: Callable[..., Any]
    linear_fp8: Callable[..., Any]
    flow_to_x0: Callable[..., Any]
    renoise: Callable[..., Any]
    names: Mapping[str, str]  # operation -> implementation that serves it


def row(op: str, device: str) -> tuple[Candidate, ...]:
    """Candidates for `op` on a device type, best first."""
    return TABLE[op, device]


def load(op: str, candidate: Candidate) -> Callable[..., Any]:
    """Import the callable of a candidate; KernelError names what is missing and how to get it."""
    try:
        return getattr(importlib.import_module(candidate.module), op)
    except ImportError as error:
        hint = HINTS.get(candidate.name, HINTS["cpu"])
        raise KernelError(f"{op}: implementation {candidate.name!r} is not available ({error}); {hint}") from error


def reference(op: str) -> Callable[..., Any]:
    """The meaning of an operation, in plain torch."""
    return load(op, Candidate("reference", f"cfengine.kernels.{op}.reference"))


def select(
    device: str = "cpu", choices: Mapping[str, str] | None = None, prefer: str | None = None, *, fp8: bool = False
) -> Ops:
    """Choose one implementation per operation for a device type ("cpu", "cuda").

    choices: operation -> implementation name that must be used      prefer: implementation to use wherever the
    operation has one of that name (an error if it has one that is not built)      fp8: e4m3 operands will come
    """
    choices = dict(choices or {})
    unknown = set(choices) - set(OPERATIONS)
    if unknown:
        raise KernelError(f"unknown operation {sorted(unknown)[0]!r}; known: {', '.join(OPERATIONS)}")
    functions, names = {}, {}
    for op in OPERATIONS:
        candidates = [c for c in row(op, device) if c.fp8 or not fp8]
        listed = [c.name for c in candidates]
        wanted = choices.get(op) or (prefer if prefer in listed else None)
        if wanted is not None and wanted not in listed:
            kind = " that takes e4m3" if fp8 else ""
            raise KernelError(f"{op} has no implementation {wanted!r} on {device}{kind}; known: {', '.join(listed)}")
        if wanted is not None:
            candidate = candidates[listed.index(wanted)]
            functions[op], names[op] = load(op, candidate), candidate.name
        else:
            functions[op], names[op] = _first(op, candidates)
    return Ops(**functions, names=names)


def _first(op: str, candidates: list[Candidate]) -> tuple[Callable[..., Any], str]:
    """The first candidate that loads, and its name; the reference always does."""
    for candidate in candidates:
        try:
            return load(op, candidate), candidate.name
        except KernelError:
            if candidate.name == "reference":
                raise
    raise KernelError(f"{op} has no implementation that takes these operands; choose precision 'bf16'")


def not_built(device: str, names: Mapping[str, str]) -> list[str]:
    """Operations that plain torch serves because the best implementation, built for them, does not load."""
    missing = []
    for op, name in names.items():
        best = row(op, device)[0]
        if name == "reference" and best.name != name:
            try:
                load(op, best)
            except KernelError:
                missing.append(op)
    return missing


def implementations(device: str = "cpu") -> list[str]:
    """Names of implementations that load and that an operation may be served by unasked, best first."""
    found: dict[str, None] = {}
    for op in OPERATIONS:
        for candidate in row(op, device):
            try:
                load(op, candidate)
            except KernelError:
                continue
            found[candidate.name] = None
            if candidate.name == "reference":  # what follows is never chosen unasked
                break
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
