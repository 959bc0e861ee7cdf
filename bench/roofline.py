"""Floor of a chunk from measured ceilings, and the gap to it term by term.

    python -m cfengine.bench.roofline [--precision bf16,fp8] [--plot FILE.png] [--json FILE]

The floor does the arithmetic of `cfengine.bench.work` at the rate of the largest matrix product measured in this run
and moves every byte at the measured copy bandwidth, nothing overlapped and nothing waited for. Beside it stand the
engine's own operations, each timed alone with a full memory and multiplied by how often a chunk runs it, and a chunk as
it streams; what the terms do not explain is launch gaps and all that is not in the table. Where the decoder overlaps
with the clean pass, that rest can be negative.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F

from cfengine.bench import command, plots
from cfengine.bench.ceilings import Ceilings, measure_ceilings
from cfengine.bench.command import Say, several
from cfengine.bench.records import record
from cfengine.bench.settings import PRECISIONS, Setting
from cfengine.bench.synthetic import EngineRun, chunk_inputs, describe, prompt_tokens
from cfengine.bench.timing import measure
from cfengine.bench.work import chunk_work, sizes, taehv_work
from cfengine.config import EngineConfig
from cfengine.engine import Engine
from cfengine.errors import ConfigError

TERMS = ("linear", "attention", "cross", "element-wise", "unfused", "decode", "gaps and rest")
TURNS = 6  # blocks whose weights and pages are used in turn
STREAMED = 12  # chunks timed


def floor(config: EngineConfig, precision: str, ceilings: Ceilings) -> dict[str, float]:
    """Term -> seconds of a chunk that no implementation can go below on this machine."""
    work = chunk_work(config, sizes(config, text=prompt_tokens(config) + 1, precision=precision))
    flops, traffic = taehv_work(config)
    exact = "fp32" if precision == "fp32" else "bf16"
    return {
        "linear": work.linear / ceilings.rate(precision),
        "attention": work.attention / ceilings.rate(precision),
        "cross": work.cross / ceilings.rate(exact),
        "element-wise": work.elements / ceilings.bandwidth,
        "unfused": 0.0,
        "decode": max(flops / ceilings.rate(exact), traffic / ceilings.bandwidth),
        "gaps and rest": 0.0,
    }


class Pieces:
    """The parts of a chunk, each timed alone, on an engine's own model with a full memory."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.run, self.device, self.seconds = EngineRun.of(engine), engine.device, seconds
        self.config, self.ops = engine.config, engine.ops
        self.blocks = list(engine.model.blocks)[:TURNS]
        self.tokens = self.config.memory.chunk_frames * self.config.page_tokens
        frames = self.config.memory.chunk_frames
        for start in range(0, self.config.memory.slots + frames, frames):
            self.run.chunk(*chunk_inputs(self.config, start), start)
        scheduler = self.run.scheduler
        self.modulation = scheduler.modulation(scheduler.schedule.warped[0])

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.run.dtype)

    def time(self, calls, graph: bool = True) -> float:
        """Seconds of one of the calls."""
        return measure(calls, self.device, seconds=self.seconds, graph=graph).median

    def product(self, name: str) -> float:
        """One product of a block, as it is multiplied."""
        calls = []
        for block in self.blocks:
            weight, scale, bias = block.products[name]
            rows = self.normal(self.tokens, weight.shape[1])
            if scale is None:
                calls.append(lambda rows=rows, weight=weight, bias=bias: F.linear(rows, weight, bias))
            else:
                rows = self.ops.quantise_rows(rows)
                parts = *rows, weight, scale, bias
                calls.append(lambda parts=parts, bias=bias: self.ops.linear_fp8(*parts, dtype=bias.dtype))
        return self.time(calls)

    def linear(self) -> float:
        """All products of a block."""
        return sum(self.product(name) for name in self.blocks[0].products)

    def attention(self) -> float:
        """Attention of a block over every slot."""
        model = self.config.model
        query = self.normal(self.tokens, model.heads, model.head_dim)
        return self.time([lambda layer=i: self.run.attention(query, layer) for i in range(len(self.blocks))])

    def cross(self) -> float:
        """Attention of a block to the prompt."""
        model = self.config.model
        query = self.normal(self.tokens, model.heads, model.head_dim)
        return self.time([lambda c=c: self.ops.cross_attention(query, *c) for c in self.run.cross[: len(self.blocks)]])

    def store(self) -> float:
        """Norms, rotation and pages of a block."""
        dim = self.config.model.dim
        fused = self.normal(self.tokens, 3 * dim)
        return self.time([lambda layer=i: self.run.store(fused, layer) for i in range(len(self.blocks))])

    def gated(self) -> float:
        """Gated residual and norm, as the feed-forward begins with it."""
        x, y = (self.normal(self.tokens, self.config.model.dim) for _ in range(2))
        calls = []
        for block, modulation in zip(self.blocks, self.modulation.blocks, strict=False):
            _, _, gate, shift, scale, _ = modulation
            options = {"eps": block.eps, "fp8": "ffn.0" in block.fp8}
            calls.append(lambda p=(gate, shift, scale), o=options: self.ops.gated_residual(x, y, *p, **o))
        return self.time(calls)

    def segment(self) -> float:
        """Everything between two self-attentions."""
        model, segments = self.config.model, self.run.scheduler.segments
        x = self.normal(self.tokens, model.dim)
        attended = self.normal(self.tokens, model.heads, model.head_dim)
        last = min(len(self.blocks), model.layers - 1)
        return self.time(
            [
                lambda i=i: segments.middle(i, x, attended, self.modulation, self.run.cross[i])
                for i in range(last)
            ]
        )  # fmt: skip


def pieces(engine: Engine, seconds: float) -> dict[str, float]:
    """Term -> seconds of a chunk, its parts timed alone."""
    parts = Pieces(engine, seconds)
    config = engine.config
    blocks = config.model.layers * (len(config.sampler.steps) + 1) - 1  # the last of the clean pass stops at its keys
    linear, cross, gated = parts.linear(), parts.cross(), parts.gated()
    apart = parts.segment() - linear - cross - 3 * gated
    return {
        "linear": blocks * linear,
        "attention": blocks * parts.attention(),
        "cross": blocks * cross,
        "element-wise": blocks * (3 * gated + parts.store()),
        "unfused": blocks * max(0.0, apart),  # GELU, the norm of the cross-attention's query, quantisation
    }


def streamed(engine: Engine, seconds: float) -> tuple[float, float]:
    """(period, decode) of a chunk in seconds with a full memory, medians."""
    frames = engine.config.memory.chunk_frames
    with engine.session("anything", seed=0) as session:
        for _ in range(engine.config.memory.slots // frames + 1):
            session.next_chunk()
        periods, last = [], time.perf_counter()
        for _ in range(STREAMED):
            session.next_chunk()
            periods.append(time.perf_counter() - last)
            last += periods[-1]
        latents = session.latents.clone()
    decoder = engine.codec.decoder()
    decoder.decode(latents)  # the first chunk of a stream is shorter
    decode = measure([lambda: decoder.draw(latents)], engine.device, seconds=seconds)
    return median(periods), decode.median


def measured(engine: Engine, seconds: float) -> dict[str, float]:
    """Term -> seconds of a chunk as it runs; the last term makes the sum the period."""
    found = pieces(engine, seconds)
    period, found["decode"] = streamed(engine, seconds)
    return found | {"gaps and rest": period - sum(found.values())}


def table(columns: dict[str, dict[str, float]], floors: dict[str, dict[str, float]]) -> str:
    """Milliseconds by term: floor, measured, gap."""
    lines = []
    for name, found in columns.items():
        least = floors[name]
        lines.append(f"{name + ', ms a chunk':<24}{'floor':>9}{'measured':>10}{'gap':>9}")
        for term in (*TERMS, "total"):
            low, high = (sum(t.values()) if term == "total" else t[term] for t in (least, found))
            lines.append(f"  {term:<22}{1e3 * low:>9.2f}{1e3 * high:>10.2f}{1e3 * (high - low):>9.2f}")
    return "\n".join(lines)


def records(setting: Setting, least: dict[str, float], found: dict[str, float]) -> list[dict]:
    """Floor and measured chunk, terms in the configuration."""
    config = setting.config()
    low, high = sum(least.values()), sum(found.values())
    shape = describe(
        config,
        precision=setting.precision,
        size=setting.size,
        floor_ms={term: 1e3 * value for term, value in least.items()},
        measured_ms={term: 1e3 * value for term, value in found.items()},
    )
    return [
        record(f"roofline_floor_ms_{setting.suffix}", 1e3 * low, "ms/chunk", config=shape),
        record(f"roofline_chunk_ms_{setting.suffix}", 1e3 * high, "ms/chunk", "floor", high / low, shape),
    ]


def run(options: argparse.Namespace, say: Say) -> Iterator[list[dict]]:
    """Ceilings, floors, parts, table and plot."""
    floors, columns = {}, {}
    with torch.inference_mode():
        ceilings = measure_ceilings(options.device, options.seconds)
        yield ceilings.records()
        for precision in several(options.precision, PRECISIONS, "precision"):
            setting = Setting("slow_fast", precision, size=options.size)
            floors[precision] = floor(setting.config(), precision, ceilings)
            with setting.engine(options.device) as engine:
                columns[precision] = measured(engine, options.seconds)
            yield records(setting, floors[precision], columns[precision])
    say(table(columns, floors))
    if options.plot:
        picture(options.plot, columns, floors, say)


def picture(path: str, columns: dict[str, dict[str, float]], floors: dict[str, dict[str, float]], say: Say) -> None:
    """Floor beside measured of every precision; without matplotlib a sentence."""
    bars = {}
    for name in columns:
        for title, terms in ((f"{name}\nfloor", floors[name]), (f"{name}\nmeasured", columns[name])):
            bars[title] = {term: 1e3 * value for term, value in terms.items()}
    try:
        plots.stacked(path, bars, "A chunk against its floor, memory full")
    except ConfigError as error:
        say(str(error))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = command.parser("roofline", __doc__.split("\n")[0])
    parser.add_argument("--precision", default="bf16", help=f"one or several of {', '.join(PRECISIONS)}")
    parser.add_argument("--seconds", type=float, default=0.25, help="spent on timing each part")
    parser.add_argument("--plot", metavar="FILE", help="picture to write (.png)")
    return command.run(parser.parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
