"""Attention on the CPU against the machine's rate of matrix products: `python -m cfengine.bench.attention`.

A share is the attention's arithmetic (4 x queries x keys x width) per second over that of a large square product of
torch in the same type, timed in turns in one run, medians. Results are checked against float64 first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from cfengine.bench.records import record, write
from cfengine.errors import CFEngineError
from cfengine.kernels.paged_attention.cases import TOLERANCE, Shape, make
from cfengine.kernels.paged_attention.reference import paged_attention as reference

MEDIUM = Shape(page_tokens=390, frames=3, slots=21, heads=6, head_dim=64)
GEMM_SIZE = 2048
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(functions: dict, rounds: int) -> dict[str, float]:
    """Return the median time of each function, all of them timed in turns after one round to warm up."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def check(kernel, operands) -> float:
    """Return the largest error of the first frame's first queries, relative; AssertionError beyond the tolerance."""
    q, *rest = operands
    few = torch.arange(0, q.shape[0], max(1, q.shape[0] // 48))[:48]
    found = kernel(*operands)[few].double()
    frames = operands[6][few // (q.shape[0] // operands[6].shape[0])]
    wide = [t.double() if t.is_floating_point() else t for t in rest[:-1]]
    expected = reference(q[few].double(), *wide, frames)
    worst = float((found - expected).abs().max() / expected.abs().max())
    assert worst < TOLERANCE[q.dtype], f"attention is off by {worst:.1e}, tolerance {TOLERANCE[q.dtype]:.1e}"
    return worst


def share(kind: str, shape: Shape = MEDIUM, rounds: int = 7) -> dict:
    """Return rates in GFLOP/s of attention, a square product and torch's attention in one type, and the error."""
    from cfengine.kernels.paged_attention.cpu import paged_attention

    dtype = TYPES[kind]
    operands = make(shape, dtype)
    q, k_pages, v_pages, page_ids = operands[:4]
    worst = check(paged_attention, operands)
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE).to(dtype)
    query = q.transpose(0, 1)[None].contiguous()
    key, value = (
        pages[page_ids.long()].flatten(0, 1).transpose(0, 1)[None].contiguous() for pages in (k_pages, v_pages)
    )
    times = seconds(
        {
            "attention": lambda: paged_attention(*operands),
            "gemm": lambda: left @ right,
            "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        },
        rounds,
    )
    flop = 4 * q.shape[0] * shape.slots * shape.page_tokens * shape.heads * shape.head_dim
    return {
        "attention": flop / times["attention"] / 1e9,
        "gemm": 2 * GEMM_SIZE**3 / times["gemm"] / 1e9,
        "sdpa": flop / times["sdpa"] / 1e9,
        "error": worst,
    }


def records(kind: str, rates: dict, shape: Shape) -> list[dict]:
    """Return the records of one type: our share of the product's rate, and that of torch's attention."""
    from cfengine import _C

    config = {**shape._asdict(), "dtype": kind, "isa": _C.isa(), "gemm": GEMM_SIZE, "error": rates["error"]}
    gemm = f"torch.mm {kind}, {rates['gemm']:.0f} GFLOP/s"
    ours, theirs = rates["attention"] / rates["gemm"], rates["sdpa"] / rates["gemm"]
    return [
        record(f"attention_share_of_gemm_{kind}", ours, "share", baseline=gemm, ratio=ours, config=config),
        record(f"sdpa_share_of_gemm_{kind}", theirs, "share", baseline=gemm, ratio=theirs, config=config),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the share of the product's rate that attention reaches in both types; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.bench.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--rounds", type=int, default=7, help="timed repetitions, 7")
    options = parser.parse_args(arguments)
    found = []
    try:
        for kind in TYPES:
            rates = share(kind, rounds=options.rounds)
            found += records(kind, rates, MEDIUM)
            ours, theirs = (f"{rates[n]:.0f} GFLOP/s, {rates[n] / rates['gemm']:.0%}" for n in ("attention", "sdpa"))
            sys.stdout.write(
                f"{kind}: attention {ours} of torch.mm ({rates['gemm']:.0f}); torch SDPA {theirs}; "
                f"error {rates['error']:.1e}\n"
            )
        if options.json:
            write(options.json, found)
    except (CFEngineError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
