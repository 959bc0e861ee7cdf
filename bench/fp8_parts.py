"""What each part of fp8 costs in exactness, on any machine: products one by one, pages, attention, all of it.

    python -m cfengine.bench.fp8_parts [--model tiny-world|random] [--chunks N] [--json FILE]

Teacher-forced: every pass gets the inputs and the memory decisions of the same weights in float32, and an error is the
root mean square of the flows' difference over the deviation of the teacher's flow. The clean pass is shown apart: only
its keys and values are used, never its flow. What a GPU's tensor cores round is
rounded in plain torch (`kernels/paged_attention/rounding.py`), so the figures hold but for the order of sums.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from statistics import fmean

import torch

from cfengine.bench.check import pass_errors
from cfengine.bench.records import record, write
from cfengine.bench.synthetic import EngineRun, describe, random_engine
from cfengine.config import PRECISIONS, PRODUCTS, EngineConfig, Kept, ModelConfig, PrecisionConfig, VideoConfig, preset
from cfengine.engine import Engine
from cfengine.errors import CFEngineError

# Head size, depth and number of slots of the same order as in the full model; small enough for a processor.
RANDOM = EngineConfig(
    name="bench-fp8",
    model=ModelConfig(dim=384, ffn_dim=2240, heads=3, layers=8, text_dim=64, text_len=32, freq_dim=64),
    video=VideoConfig(width=128, height=96),
    codec="taehv",
)
GOAL = 0.05  # of the deviation of the flow
PROMPT = "pan right, desert, sunset"


class OnePrompt:
    """A text encoder that reads PROMPT, whatever it is asked for."""

    def __init__(self, text) -> None:
        self.text = text

    def encode(self, prompt: str) -> torch.Tensor:
        return self.text.encode(PROMPT)


def alone(product: str) -> PrecisionConfig:
    """One kind of product in e4m3, in every block."""
    others = (Kept(f"blocks.*.{other}", "another one is measured") for other in PRODUCTS if other != product)
    return PrecisionConfig(linears="fp8", keep=tuple(others))


PARTS: dict[str, PrecisionConfig] = {
    **{product: alone(product) for product in PRODUCTS},
    "all products": PrecisionConfig(linears="fp8"),
    "pages": PrecisionConfig(pages="fp8"),
    "pages and attention": PrecisionConfig(pages="fp8", attention="fp8"),
    "fp8": PRECISIONS["fp8"],
}


def engine(model: str, precision: PrecisionConfig) -> Engine:
    """The shipped model, or one of random weights, in float32 but for what `precision` names."""
    base = RANDOM if model == "random" else preset(model)
    config = replace(base, precision=precision)
    if precision.fp8:
        config = replace(config, kernels=(("paged_attention", "rounding"),))
    made = random_engine(config) if model == "random" else Engine.from_pretrained(model, config=config)
    made.text = OnePrompt(made.text)
    return made


def measure(model: str, chunks: int, parts: dict[str, PrecisionConfig]) -> dict[str, list[list[float]]]:
    """Errors by part: chunks x passes, the clean pass last."""
    found = {}
    for name, precision in parts.items():
        with engine(model, PrecisionConfig()) as teacher, engine(model, precision) as student:
            found[name] = pass_errors(EngineRun.of(teacher), EngineRun.of(student), chunks, forced=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code, 1 where a denoise pass in fp8 is beyond the goal."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.bench.fp8_parts", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-world", help="a preset whose weights are here, or 'random'")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    options = parser.parse_args(arguments)
    try:
        if options.json:
            write(options.json, [])  # a place that cannot be written to is named before the work
        found = measure(options.model, options.chunks, PARTS)
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    shape = describe(RANDOM if options.model == "random" else preset(options.model), chunks=options.chunks)
    entries = []
    for name, errors in found.items():
        denoise, clean = [error for chunk in errors for error in chunk[:-1]], max(chunk[-1] for chunk in errors)
        sys.stdout.write(f"{name:<20} worst {max(denoise):6.2%}  mean {fmean(denoise):6.2%}  clean {clean:6.2%}\n")
        details = shape | {"mean": fmean(denoise), "clean": clean, "per_pass": errors}
        title = f"fp8_error_{options.model}_{name.replace(' ', '_')}"
        entries.append(record(title, max(denoise), "share of deviation", "float32", None, details))
    if options.json:
        write(options.json, entries)
    return int(entries[-1]["value"] > GOAL)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
