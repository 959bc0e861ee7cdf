"""Speed of every operation of the table over the model's own sizes, checked first.

    python -m cfengine.bench.kernels [--op NAME,...] [--precision bf16,fp8] [--json FILE]

Every implementation that loads is compared with the reference in float64, then timed on inputs that the cache does not
hold. Shares are of the ceilings measured in the same run: of the copy's bandwidth, or of the product's rate where the
arithmetic takes longer than the traffic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

from cfengine.bench import command, plots
from cfengine.bench.ceilings import Ceilings, has_fp8, measure_ceilings
from cfengine.bench.chunk_rows import cross, gated, linears, norm, quantised, sampler
from cfengine.bench.command import Say, several
from cfengine.bench.page_rows import attention, store, updates
from cfengine.bench.records import record
from cfengine.bench.rows import TOLERANCE, Maker, Row
from cfengine.bench.synthetic import SIZES
from cfengine.bench.timing import Times, measure, sets
from cfengine.errors import CFEngineError, ConfigError, KernelError
from cfengine.ops import OPERATIONS, Candidate, load, reference, row

KINDS = ("fp32", "bf16", "fp8")


def rows(maker: Maker) -> Iterator[Row]:
    """Every row that has work in the maker's precision, attention first."""
    memory = maker.config.memory
    for slots in dict.fromkeys((memory.slots, 3 * memory.slots // 5, memory.chunk_frames)):
        yield attention(maker, slots)
    yield from (store(maker), norm(maker), gated(maker))
    if maker.kind == "fp8":
        yield from (*quantised(maker), *linears(maker))
    else:
        yield from (cross(maker), *sampler(maker), *updates(maker))


def duplicate(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, padding included: values in e4m3 pages lie with their tokens side by side."""
    storage = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
    copy = storage.to(tensor.device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    pair = (copy, tensor) if tensor.element_size() > 1 else (copy.view(torch.uint8), tensor.view(torch.uint8))
    pair[0].copy_(pair[1])
    return copy


def changed(operands: tuple, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple:
    """Operands with every tensor replaced, those of a table too."""
    return tuple(
        change(part) if torch.is_tensor(part) else type(part)(*map(change, part)) if is_table(part) else part
        for part in operands
    )


def is_table(part) -> bool:
    """Whether an operand is a named tuple of tensors."""
    return hasattr(part, "_fields") and torch.is_tensor(part[0])


def copied(operands: tuple) -> tuple:
    """Operands whose tensors may be written."""
    return changed(operands, duplicate)


def widened(operands: tuple) -> tuple:
    """Copies with 16-bit and 32-bit floats as float64, but for tables; what is in e4m3 stays."""
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(part.double() if torch.is_tensor(part) and part.dtype in wide else part for part in copied(operands))


def expected(given: Row, operands: tuple) -> list[torch.Tensor]:
    """What the reference makes of the operands in float64."""
    if given.expect is not None:
        return given.expect(operands)
    wide = widened(operands)
    return given.look(reference(given.op)(*wide, **given.options), wide)


def error(found: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest error over the largest value of each tensor, the worst of them; infinite where one is not finite."""
    worst = 0.0
    for mine, theirs in zip(found, right, strict=True):
        mine, theirs = mine.double(), theirs.double()
        if not torch.isfinite(mine).all():
            return float("inf")
        worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)))
    return worst


def check(given: Row, call: Callable, operands: tuple, right: list[torch.Tensor]) -> float:
    """Error of an implementation; CFEngineError beyond the tolerance."""
    mine = copied(operands) if given.expect is None else operands  # pages of a full memory are not copied
    worst = error(given.look(call(*mine, **given.options), mine), right)
    if not worst <= TOLERANCE[given.kind]:
        raise CFEngineError(
            f"{given.op} ({given.label}, {given.kind}) is off by {worst:.2g} of its largest value, tolerance "
            f"{TOLERANCE[given.kind]:g}; run its tests in tests/kernels, no speed is reported"
        )
    return worst


def turns(given: Row, device) -> list[tuple]:
    """Sets of inputs, as many as it takes for the cache not to hold the next one."""
    return [given.operands(10 * i) for i in range(sets(int(given.traffic), device))]


def time_row(given: Row, call: Callable, device, seconds: float, captured: bool) -> Times:
    """Time of one call, inputs used in turn."""
    calls = [lambda operands=operands: call(*operands, **given.options) for operands in turns(given, device)]
    return measure(calls, device, seconds=seconds, graph=captured)


def candidates(op: str, kind: str, device: str) -> list[Candidate]:
    """Implementations of an operation that could take this precision, the reference first, then the best."""
    known = [c for c in row(op, device) if kind != "fp8" or c.fp8]
    return sorted(known, key=lambda c: c.name != "reference")


def row_records(given: Row, device, ceilings: Ceilings, seconds: float, say: Say) -> list[dict]:
    """Check and time every implementation of one row."""
    operands = given.operands(0)
    right = expected(given, operands)
    library = None
    if given.library is not None:
        calls = [given.library.prepare(turn) for turn in turns(given, device)]
        library = measure(calls, device, seconds=seconds, graph=True).median
    found, kind = [], torch.device(device).type
    for candidate in candidates(given.op, given.kind, kind):
        try:
            call = load(given.op, candidate)
            worst = check(given, call, operands, right)
        except KernelError as problem:
            say(f"{given.op} {candidate.name}: left out, {problem}")
            continue
        except CFEngineError as problem:
            say(f"WRONG: {problem}")
            found.append(failure(given, candidate.name, str(problem)))
            continue
        times = time_row(given, call, device, seconds, candidate.captured)
        slowest = found[0]["value"] * 1e-6 if found and found[0]["value"] else None
        entry = one_record(given, candidate.name, times, worst, ceilings, library, slowest)
        found.append(entry)
        say(line(entry))
    return found


def title(given: Row, name: str) -> str:
    """Name of a record: operation, size where it has several, precision, implementation."""
    return "_".join(filter(None, ("kernel", given.op, given.size, given.kind, name)))


def failure(given: Row, name: str, problem: str) -> dict:
    """Record of an implementation that computes something else: no time."""
    shape = {"shape": given.label, "dtype": given.kind, "implementation": name, "problem": problem}
    return record(title(given, name), None, "us", config=shape)


def one_record(given: Row, name: str, times: Times, worst: float, ceilings: Ceilings, library, plain) -> dict:
    """Record of one implementation; plain: seconds of the reference, which is timed first."""
    seconds = times.median
    arithmetic, movement = given.flops / ceilings.rate(given.kind), given.traffic / ceilings.bandwidth
    shape = {
        "shape": given.label,
        "dtype": given.kind,
        "implementation": name,
        "error": worst,
        "tolerance": TOLERANCE[given.kind],
        "timed_by": times.how,
        "low_us": 1e6 * times.low,
        "high_us": 1e6 * times.high,
        "tflops": given.flops / seconds / 1e12,
        "gb_per_s": given.traffic / seconds / 1e9,
        "ceiling": "products" if arithmetic > movement else "copy",
        "share_of_ceiling": max(arithmetic, movement) / seconds,
        "over_library": library and library / seconds,
        "over_reference": plain and plain / seconds,
    }
    against = given.library.name if given.library else "reference.py"
    ratio = shape["over_library"] if given.library else shape["over_reference"]
    return record(title(given, name), 1e6 * seconds, "us", against, ratio, shape)


def line(entry: dict) -> str:
    """One line of the table."""
    shape = entry["config"]
    rate = f"{shape['tflops']:8.1f} TFLOP/s" if shape["ceiling"] == "products" else f"{shape['gb_per_s']:8.0f} GB/s   "
    ratios = "".join(
        f"{shape[key]:8.2f}x {word}" if shape[key] else ""
        for key, word in (("over_library", "library"), ("over_reference", "reference"))
    )
    return (
        f"{entry['name'].removeprefix('kernel_'):<42}{entry['value']:>11.1f} us {rate}"
        f"{shape['share_of_ceiling']:>7.1%} of {shape['ceiling']:<9}{ratios}   [{shape['shape']}]"
    )


def run(options: argparse.Namespace, say: Say) -> Iterator[list[dict]]:
    """Ceilings, then every row."""
    wanted = several(options.op, OPERATIONS, "operation") if options.op else list(OPERATIONS)
    skipped = several(options.skip, OPERATIONS, "operation")
    kinds = several(options.precision, KINDS, "precision") if options.precision else default_kinds(options.device)
    with torch.inference_mode():
        ceilings = measure_ceilings(options.device, options.seconds)
        found = ceilings.records()
        yield found
        for kind in kinds:
            for given in rows(Maker(SIZES[options.size], options.device, kind)):
                if given.op in wanted and given.op not in skipped:
                    more = row_records(given, options.device, ceilings, options.seconds, say)
                    found = found + more
                    yield more
    if options.plot:
        try:
            plots.shares(options.plot, found)
        except ConfigError as error:
            say(str(error))


def default_kinds(device: str) -> list[str]:
    """bf16, and fp8 where there are fp8 products; float32 on a processor."""
    if torch.device(device).type == "cpu":
        return ["fp32", "bf16"]
    return ["bf16", "fp8"] if has_fp8(device) else ["bf16"]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = command.parser("kernels", __doc__.split("\n")[0])
    parser.add_argument("--op", help="one or several operations; default: all")
    parser.add_argument("--skip", default="", help="operations to leave out")
    parser.add_argument("--plot", metavar="FILE", help="picture to write (.png)")
    parser.add_argument("--precision", help=f"one or several of {', '.join(KINDS)}")
    parser.add_argument("--seconds", type=float, default=0.25, help="spent on timing each implementation")
    return command.run(parser.parse_args(arguments), run, show=False)


if __name__ == "__main__":
    sys.exit(main())
