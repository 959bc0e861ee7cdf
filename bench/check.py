"""Is it right? Two runs over one video, pass by pass, on the same inputs, before anything is timed.

`teacher` decides what goes into every pass: its noise, its x0. `student` sees the same inputs and, where it is forced,
the teacher's tables too, so that errors of one pass do not grow into the next through another decision. An error is the
root mean square of the flows' difference over the deviation of the teacher's flow.
"""

from __future__ import annotations

from statistics import fmean

import torch

from cfengine.bench.synthetic import EngineRun, chunk_inputs
from cfengine.bench.timing import difference
from cfengine.engine import Engine
from cfengine.errors import CFEngineError
from cfengine.memory.pages import Tables
from cfengine.memory.policies import Pass
from cfengine.ops import select
from cfengine.segments.walk import walk

# Against the same weights in plain torch. float32: sums in another order, 1e-6 or so a pass. bfloat16: each of dozens
# of roundings a block is 2^-9; passes of 30 blocks agree to about 2 %. A wrong page, position or gate costs tens of
# percent. fp8: three bits fewer, and what the goal allows.
LIMITS = {"fp32": 1e-4, "bf16": 0.04, "fp8": 0.08}


class Copied:
    """A rule that copies the tables of another run, which has just made the same pass."""

    def __init__(self, source: Tables) -> None:
        self.source = source

    def update(self, tables: Tables, layer: int, key_mean: torch.Tensor, step: Pass) -> None:
        """See `cfengine.memory.policies.Policy.update`."""
        for mine, theirs in zip(tables.layers[layer], self.source.layers[layer], strict=True):
            mine.copy_(theirs)


def one_pass(run: EngineRun, x: torch.Tensor, step: Pass, timestep: float) -> torch.Tensor:
    """Flow of one pass, nothing captured."""
    scheduler = run.scheduler
    return walk(scheduler.segments, run.memory, x, step, scheduler.modulation(timestep), run.cross).float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over the deviation of `expected`; infinite where anything is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).square().mean().sqrt() / expected.std())


@torch.inference_mode()
def pass_errors(teacher: EngineRun, student: EngineRun, chunks: int, *, forced: bool) -> list[list[float]]:
    """Errors of the student's flows: chunks x passes, the clean pass last.

    forced: the student takes over the teacher's tables; otherwise its own must come out the same (CFEngineError).
    """
    config, schedule = teacher.config, teacher.scheduler.schedule
    frames, device = config.memory.chunk_frames, teacher.memory.device
    if forced:
        student.memory.policy = Copied(teacher.memory.tables)
    found = []
    for start in range(0, chunks * frames, frames):
        noise, again = chunk_inputs(config, start)
        x, errors = noise.to(device), []
        for index, timestep in enumerate([*schedule.warped, schedule.context_timestep]):
            clean = index == len(schedule.warped)
            step = Pass(start, clean=clean)
            flow, other = one_pass(teacher, x, step, timestep), one_pass(student, x, step, timestep)
            errors.append(relative(other, flow))
            if not clean:
                x = teacher.ops.flow_to_x0(x, flow, schedule.sigma(timestep))
            if index + 1 < len(schedule.warped):
                x = teacher.ops.renoise(x, again[index].to(device), schedule.sigma(schedule.warped[index + 1]))
        _check_tables(teacher, student, start)
        found.append(errors)
    return found


def _check_tables(teacher: EngineRun, student: EngineRun, start: int) -> None:
    for name in ("sources", "positions", "count"):
        mine, theirs = (getattr(run.memory.tables.stacked, name) for run in (student, teacher))
        if not torch.equal(mine, theirs):
            layer = int((mine != theirs).any(dim=1).nonzero()[0])
            raise CFEngineError(
                f"after the chunk at frame {start}, {name} of layer {layer} are {mine[layer].tolist()} where the "
                f"reference operations have {theirs[layer].tolist()}; replay the traces to find the fault"
            )


def against_reference(engine: Engine, precision: str, chunks: int = 1) -> float:
    """Worst pass error of an engine's operations against the plain torch ones; CFEngineError beyond LIMITS."""
    plain = select(torch.device(engine.device).type, prefer="reference", fp8=engine.config.precision.fp8)
    errors = pass_errors(EngineRun.of(engine, plain), EngineRun.of(engine), chunks, forced=False)
    worst = max(max(row) for row in errors)
    if not worst <= LIMITS[precision]:
        raise CFEngineError(
            f"flows of {engine.config.name} in {precision} are off by {worst:.2g} of their deviation from the "
            f"reference operations, limit {LIMITS[precision]:g}; compare the operations one by one with "
            "`python -m cfengine.bench.kernels`, no speed is reported"
        )
    return worst


def flow_error(teacher: Engine, student: Engine, chunks: int) -> dict:
    """How far a precision is from another, teacher-forced, and how far apart the two videos drift when nothing is.

    -> rms (worst denoise pass), mean_rms, clean_rms (worst clean pass, whose flow is never used),
    per_pass (chunks x passes), open_loop (r.m.s. of latents, chunk by chunk)
    """
    errors = pass_errors(EngineRun.of(teacher), EngineRun.of(student), chunks, forced=True)
    flat = [error for row in errors for error in row[:-1]]
    free = [EngineRun.of(engine) for engine in (teacher, student)]
    open_loop = []
    with torch.inference_mode():
        for start in range(0, chunks * teacher.config.memory.chunk_frames, teacher.config.memory.chunk_frames):
            inputs = chunk_inputs(teacher.config, start)
            expected, found = (run.chunk(*inputs, start) for run in free)
            open_loop.append(difference(found, expected)[1])
    clean = max(row[-1] for row in errors)
    return {"rms": max(flat), "mean_rms": fmean(flat), "clean_rms": clean, "per_pass": errors, "open_loop": open_loop}
