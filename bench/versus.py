"""The engine against `reference_method`: same weights, same chunks, same decoder, on one device, in turns.

    python -m cfengine.bench.baseline --precision bf16,fp8 --json FILE

Both walk through the same video until every slot is in use; their latents are compared on the way. Then a chunk of the
baseline (5 passes and the decoder, one after the other) and a few of the engine's are timed in turns; medians count.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import median

import torch

from cfengine.bench import command
from cfengine.bench.baseline import ReferenceMethod
from cfengine.bench.command import Say, several
from cfengine.bench.records import record
from cfengine.bench.settings import DECODERS, PRECISIONS, Setting
from cfengine.bench.synthetic import chunk_inputs, describe, random_weights
from cfengine.bench.timing import clocked, difference
from cfengine.engine import Engine
from cfengine.errors import CFEngineError

# Root mean square of the first chunk's latents after 4 passes with feedback, against the baseline's own rounding.
# float32: sums in another order. bfloat16: two runs of 30 blocks, each rounded in its own way. fp8: what three bits
# fewer leave. Another page, position or gate costs tens of percent.
LIMITS = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.25}
AT_A_TIME = 4  # chunks of the engine between two of the baseline


class Rival:
    """`reference_method` on the device with the engine's weights, prompt, noise and decoder."""

    def __init__(self, engine: Engine, device: str) -> None:
        config = engine.config
        weights = random_weights(config.model, 0, device, engine.dtype)
        self.method = ReferenceMethod(
            weights, config.model, config.memory, config.sampler, config.grid, engine.dtype, device
        )
        self.config, self.start = config, 0
        self.prompt = engine.text.encode("").to(device)
        self.decoder = engine.codec.decoder()

    def chunk(self) -> torch.Tensor:
        """The next chunk's latents, decoded to pixels on the way."""
        latents = self.method.chunk(*chunk_inputs(self.config, self.start), self.prompt, self.start)
        self.decoder.decode(latents)
        self.start += self.config.memory.chunk_frames
        return latents


@torch.inference_mode()
def compare(setting: Setting, device: str, rounds: int, say: Say) -> dict:
    """One record: milliseconds of a chunk of the engine, and how many times as long the baseline takes."""
    with setting.engine(device) as engine, engine.session("anything", seed=0) as session:
        rival = Rival(engine, device)
        apart = fill(setting, session, rival)
        say(f"{setting.precision}: first chunks' latents differ by {apart[0]:.2g} r.m.s.; the memory is full")
        mine, theirs = [], []
        for _ in range(rounds):
            theirs.append(clocked(rival.chunk, device))
            mine.append(clocked(lambda: [session.next_chunk() for _ in range(AT_A_TIME)], device) / AT_A_TIME)
        seconds, against = median(mine), median(theirs)
        shape = describe(
            engine.config,
            precision=setting.precision,
            decoder=setting.decoder,
            size=setting.size,
            denoise_passes=len(engine.config.sampler.steps),
            includes="denoise passes, clean pass, decoder, copy to host memory, on both sides",
            baseline_ms=1e3 * against,
            engine_times=mine,
            baseline_times=theirs,
            latents_rms=apart,
            implementations=engine.implementations(),
        )
    name = f"engine_vs_baseline_{setting.suffix}"
    kind = str(rival.method.dtype).removeprefix("torch.")
    return record(name, 1e3 * seconds, "ms/chunk", f"reference_method, torch SDPA, {kind}", against / seconds, shape)


def fill(setting: Setting, session, rival: Rival) -> list[float]:
    """Stream both until every slot is in use; -> r.m.s. distance of the latents, chunk by chunk.

    CFEngineError where the first chunk's are too far apart: later ones drift in any two types.
    """
    apart = []
    while rival.start < session.config.memory.slots + session.config.memory.chunk_frames:
        session.next_chunk()
        apart.append(difference(session.latents.to(rival.method.device), rival.chunk())[1])
        if not apart[0] <= LIMITS[setting.precision]:
            raise CFEngineError(
                f"the engine's first latents in {setting.precision} are {apart[0]:.2g} r.m.s. from reference_method's, "
                f"limit {LIMITS[setting.precision]:g}; run the replay of the traces, no ratio is reported"
            )
    return apart


def run(options: argparse.Namespace, say: Say) -> Iterator[list[dict]]:
    """One record a precision."""
    for precision in several(options.precision, PRECISIONS, "precision"):
        setting = Setting("slow_fast", precision, options.decoder, size=options.size)
        yield [compare(setting, options.device, options.rounds, say)]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = command.parser("baseline", __doc__.split("\n")[0])
    parser.add_argument("--precision", default="bf16", help=f"one or several of {', '.join(PRECISIONS)}")
    parser.add_argument("--decoder", choices=DECODERS, default=DECODERS[0])
    parser.add_argument("--rounds", type=int, default=5, help="medians are taken over them")
    return command.run(parser.parse_args(arguments), run)
