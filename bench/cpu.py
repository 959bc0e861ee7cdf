"""Speed on a processor: the engine against `reference_method`, attention against GEMM, frames/s of tiny-world.

    python -m cfengine.bench.cpu [--json FILE] [--quick] [--threads N] [--rounds N]

Chunks are timed in steady state (memory full) at dim 384, ffn 1536, 6 heads of 64, 8 layers, 390 tokens a latent
frame, chunk 3, 21 slots, with random weights and the codec left out. Both sides first fill their memories from the
same noise and their latents are compared; then rounds of baseline, engine, baseline, engine ... are timed, and medians
taken. A GEMM is timed in every round too, so that a machine that slows down slows everything.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from statistics import median

import torch

from cfengine.bench.baseline import RANGES as BASELINE_RANGES
from cfengine.bench.baseline import ReferenceMethod, chunk_flops
from cfengine.bench.records import record, write
from cfengine.bench.shares import share_table, shares
from cfengine.bench.synthetic import EngineRun, chunk_inputs, describe, random_weights
from cfengine.bench.timing import Gemm, difference, timed
from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig, preset
from cfengine.engine import Engine
from cfengine.errors import CFEngineError
from cfengine.ops import OPERATIONS

SIZES = EngineConfig(
    name="bench-cpu",
    model=ModelConfig(dim=384, ffn_dim=1536, heads=6, layers=8),
    memory=MemoryConfig(),
    video=VideoConfig(width=416, height=240),
)
QUICK = EngineConfig(
    name="bench-cpu-quick",
    model=ModelConfig(dim=64, ffn_dim=128, heads=2, layers=2, text_dim=32, text_len=16, freq_dim=32),
    memory=MemoryConfig(),
    video=VideoConfig(width=64, height=48),
)
PROMPT_TOKENS = 100  # live tokens of 512: the released model is prompted with a paragraph
# Both sides sum in float32 in another order; over 8 layers and 5 passes of 21-frame context that leaves about 1e-6 of
# the largest latent, and the recorded traces are held to the same 1e-4.
FLOAT32_LIMIT = 1e-4
# bfloat16 keeps 8 bits: 4e-3 per rounding. 8 layers and 4 passes with feedback leave 0.7 % of the latents' root mean
# square; a wrong page, position or gate costs tens of percent.
BFLOAT16_LIMIT = 0.03
TINY_PROMPT = "pan left, a sunny meadow"
TINY_SECONDS = 30
FILL_LIMIT = 100  # chunks; slow memory of the paper's rule gains at most one page every other chunk


class Contest:
    """Baseline and engine, each in float32 and bfloat16, walking through the same video."""

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.start = config, 0
        self.prompt = torch.randn(min(PROMPT_TOKENS, config.model.text_len - 1), config.model.text_dim)
        weights = random_weights(config.model)
        arguments = config.model, config.memory, config.sampler, config.grid
        self.baselines = {d: ReferenceMethod(weights, *arguments, d) for d in (torch.float32, torch.bfloat16)}
        self.engines = {d: EngineRun(weights, config, self.prompt, d) for d in (torch.float32, torch.bfloat16)}

    def inputs(self):
        """Noise of the next chunk."""
        return chunk_inputs(self.config, self.start)

    def baseline(self, dtype, noise, renoise):
        return self.baselines[dtype].chunk(noise, renoise, self.prompt, self.start)

    def engine(self, dtype, noise, renoise):
        return self.engines[dtype].chunk(noise, renoise, self.start)

    def fill(self, say) -> dict[str, float]:
        """Fill every memory and check the latents; CFEngineError beyond the limits.  -> largest errors."""
        frames, slots = self.config.memory.chunk_frames, self.config.memory.slots
        errors = {"float32_max": 0.0, "bfloat16_rms": 0.0}
        while self.start < slots + frames:
            inputs = self.inputs()
            expected = self.baseline(torch.float32, *inputs)
            exact = self.engine(torch.float32, *inputs)
            errors["float32_max"] = max(errors["float32_max"], difference(exact, expected)[0])
            errors["bfloat16_rms"] = max(
                errors["bfloat16_rms"], difference(self.engine(torch.bfloat16, *inputs), exact)[1]
            )
            if errors["float32_max"] > FLOAT32_LIMIT or errors["bfloat16_rms"] > BFLOAT16_LIMIT:
                raise CFEngineError(
                    f"the engine's latents at frame {self.start} differ from reference_method's: float32 "
                    f"{errors['float32_max']:.2g} of the largest (limit {FLOAT32_LIMIT}), bfloat16 "
                    f"{errors['bfloat16_rms']:.2g} r.m.s. (limit {BFLOAT16_LIMIT}); run the replay of the traces "
                    "to find the operation at fault, no speed is reported"
                )
            self.start += frames
            say(f"checked frames 0 to {self.start - 1}: {errors}")
        self.baselines[torch.bfloat16].copy_state(self.baselines[torch.float32])
        inputs = self.inputs()
        low, high = self.baseline(torch.bfloat16, *inputs), self.baseline(torch.float32, *inputs)
        for dtype in self.engines:
            self.engine(dtype, *inputs)
        self.start += frames
        errors["baseline_bfloat16_rms"] = difference(low, high)[1]
        return errors

    def times(self, rounds: int, gemms: dict[torch.dtype, Gemm], say) -> dict[tuple[str, torch.dtype], list[float]]:
        """Seconds per chunk of (side, type), interleaved."""
        times: dict[tuple[str, torch.dtype], list[float]] = {}
        for index in range(rounds):
            inputs = self.inputs()
            for dtype in (torch.float32, torch.bfloat16):
                gemms[dtype].measure()
                times.setdefault(("baseline", dtype), []).append(timed(self.baseline, dtype, *inputs))
                times.setdefault(("engine", dtype), []).append(timed(self.engine, dtype, *inputs))
            self.start += self.config.memory.chunk_frames
            last = ", ".join(f"{side} {name(dtype)} {seconds[-1]:.3g} s" for (side, dtype), seconds in times.items())
            say(f"round {index + 1} of {rounds}: {last}")
        return times


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def chunk_records(contest: Contest, times, gemms, errors, processor_share: float) -> list[dict]:
    """The two ratios, and the baseline's time over that of its products alone."""
    config, model = contest.config, contest.config.model
    middle = {key: median(values) for key, values in times.items()}
    faster = min((torch.float32, torch.bfloat16), key=lambda dtype: middle["baseline", dtype])
    records = []
    for dtype, rival, short in ((torch.float32, torch.float32, "fp32"), (torch.bfloat16, faster, "bf16")):
        seconds, against = middle["engine", dtype], middle["baseline", rival]
        more = {
            "baseline_seconds": against,
            "engine_times": times["engine", dtype],
            "baseline_times": times["baseline", rival],
            "prompt_tokens": contest.prompt.shape[0],
            "processor_share": processor_share,  # well below 1: the machine was busy with something else
            "implementations": contest.engines[dtype].ops.names,
        }
        errs = {k: v for k, v in errors.items() if k.startswith(name(dtype)) or name(dtype) in k}
        records.append(
            record(
                f"engine_vs_baseline_chunk_{short}",
                seconds,
                "s/chunk",
                baseline=f"reference_method {name(rival)}",
                ratio=against / seconds,
                config=describe(config, dtype=name(dtype), errors=errs, **more),
            )
        )
    flops = chunk_flops(model, config.memory, config.page_tokens)
    bound = sum(flops.values()) / gemms[torch.float32].rate
    over = middle["baseline", torch.float32] / bound
    rates = {f"gemm_{name(dtype)}_gflops": gemm.rate / 1e9 for dtype, gemm in gemms.items()}
    more = {"dtype": "float32", "gflop": {kind: value / 1e9 for kind, value in flops.items()}, "bound_seconds": bound}
    shape = describe(config, **more, **rates)
    return [*records, record("baseline_over_gemm_bound", over, "x", "FLOP / GEMM rate", over, shape)]


def attention_record(run: EngineRun, short: str, repeats: int) -> dict:
    """Rate of paged attention over a full memory as a share of the GEMM rate, timed in turns."""
    config, gemm = run.config, Gemm(run.config, run.dtype)
    model, memory = config.model, config.memory
    tokens = memory.chunk_frames * config.page_tokens
    query = torch.randn(tokens, model.heads, model.head_dim).to(run.dtype)
    times: list[float] = []
    run.attention(query)
    for _ in range(repeats):
        gemm.measure(2)
        times += [timed(run.attention, query) for _ in range(2)]
    flops = 4.0 * tokens * memory.slots * config.page_tokens * model.dim
    rate = flops / median(times)
    more = {"dtype": name(run.dtype), "attention_gflops": rate / 1e9, "gemm_gflops": gemm.rate / 1e9}
    more["implementation"] = run.ops.names["paged_attention"]
    share = rate / gemm.rate
    return record(f"attention_share_of_gemm_{short}", share, "x", "torch GEMM", share, describe(config, **more))


def fill_chunks(engine: Engine) -> tuple[int, int]:
    """Chunks until every layer's memory is full (at most FILL_LIMIT), and the slots then in use in the emptiest."""
    with engine.session(TINY_PROMPT, seed=0) as session:
        chunk, used = 0, 0
        while used < engine.config.memory.slots and chunk < FILL_LIMIT:
            session.next_chunk()
            chunk += 1
            used = min(int(table.count) for table in session.memory.tables.layers)
    return chunk, used


def full_memory(config: EngineConfig) -> EngineConfig:
    """A threshold that no cosine reaches: every chunk that may be promoted is, so that all slots come to be attended.

    With the trained threshold layers that find little new keep fewer pages, and a chunk is cheaper.
    """
    return replace(config, memory=replace(config.memory, threshold=2.0))


def stream_record(engine: Engine, seconds: float) -> dict:
    """Frames per second of Engine.stream over `seconds` of video with a full memory, decode included.

    The same seed first shows how many chunks fill the memory; the stream then passes those before the clock starts.
    """
    video, slots = engine.config.video, engine.config.memory.slots
    frames = engine.config.memory.chunk_frames * video.temporal_stride
    before, used = fill_chunks(engine)
    last = before + max(1, round(seconds * video.fps / frames))
    arrivals: list[float] = []
    stream = engine.stream(TINY_PROMPT, seed=0)
    chunk = -1
    for frame in stream:
        if frame.timings.chunk > chunk:
            chunk = frame.timings.chunk
            if chunk >= before:
                arrivals.append(time.perf_counter())
            if chunk == last:
                break
    stream.close()
    periods = [after - earlier for earlier, after in zip(arrivals, arrivals[1:], strict=False)]
    shape = describe(
        engine.config,
        dtype=name(engine.dtype),
        width=video.width,
        height=video.height,
        prompt=TINY_PROMPT,
        chunks=len(periods),
        frames_per_chunk=frames,
        chunks_before=before,
        slots_in_use=used,
        memory_full=used == slots,
        sustained_fps=frames * len(periods) / (arrivals[-1] - arrivals[0]),
        slowest_chunk_seconds=max(periods),
        implementations=engine.implementations(),
    )
    return record("tiny_world_fps", frames / median(periods), "frames/s", config=shape)


def profile_table(contest: Contest) -> str:
    """Share of a chunk's time per operation, for the baseline and for each type of the engine."""
    inputs, start = contest.inputs(), contest.start
    watched = {f"engine {name(dtype)}": run.watched() for dtype, run in contest.engines.items()}
    baseline = contest.baselines[torch.float32]
    columns = {
        "baseline float32": shares(BASELINE_RANGES, lambda: baseline.watched().chunk(*inputs, contest.prompt, start))
    }
    for title, run in watched.items():
        columns[title] = shares(OPERATIONS, lambda run=run: run.chunk(*inputs, start))
    return share_table(columns)


def run(config: EngineConfig, rounds: int, say) -> list[dict]:
    """Check, then time; the table of shares goes to `say`."""
    gemms = {dtype: Gemm(config, dtype) for dtype in (torch.float32, torch.bfloat16)}
    with torch.inference_mode():
        contest = Contest(config)
        errors = contest.fill(say)
        clocks = time.perf_counter(), time.process_time()
        times = contest.times(rounds, gemms, say)
        wall, worked = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        share = worked / wall / torch.get_num_threads()
        say(f"this process had {share:.0%} of its {torch.get_num_threads()} threads' processors while timing")
        records = chunk_records(contest, times, gemms, errors, share)
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            records.append(attention_record(contest.engines[dtype], short, repeats=2 * rounds))
        say("share of a chunk's time per operation (profiled, memory full):\n" + profile_table(contest))
    return records


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.bench.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no tiny-world: does it run, not how fast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; medians are taken over them")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    torch.set_num_threads(options.threads)
    try:
        if options.json:
            write(options.json, [])  # a place that cannot be written to is named before the work
        if options.quick:
            records = run(QUICK, 2, say)
        else:
            with Engine.from_pretrained("tiny-world", config=full_memory(preset("tiny-world"))) as engine:
                records = run(SIZES, options.rounds, say)
                records.append(stream_record(engine, TINY_SECONDS))
        for entry in records:
            ratio = "" if entry["ratio"] is None else f"   ratio {entry['ratio']:.3f} against {entry['baseline']}"
            say(f"{entry['name']:<34}{entry['value']:>10.4g} {entry['unit']}{ratio}")
        if options.json:
            write(options.json, records)
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
