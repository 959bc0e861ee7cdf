"""Drive golden traces through the engine's own policies, model and operations, and report every difference.

    python -m cfengine.testing.replay FILE_OR_DIR... [--impl reference|cpu|triton|cuda|sdpa] [--device cpu|cuda]
                                      [--dtype float32|float16|bfloat16]

Traces were recorded in float32. In a type of 16 bits weights, activations and pages are rounded to it; tables, actions
and counters must still be the recorded ones, and a decision that the type cannot settle is refused. CUDA attention
takes 16 bits and passes float32 on to Triton.

Exit code 0: within tolerance.  1: a tensor, table, action or counter differs.  2: a trace that cannot be read or that
the type cannot settle, or an implementation that is not built.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cfengine.config import EngineConfig, triton_interpreted
from cfengine.errors import CFEngineError
from cfengine.kernels.rope import axis_pairs, rotate, spatial_table
from cfengine.kernels.slow_fast_update.reference import ACTIONS
from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass, SlowFast
from cfengine.model.dit import Attention, CausalDiT
from cfengine.ops import Ops, select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import Schedule
from cfengine.scheduler.scenes import timeline
from cfengine.segments.exported import GraphSegments
from cfengine.segments.torch import TorchSegments
from cfengine.testing.report import DTYPES, TOLERANCE, Report
from cfengine.testing.traces import Trace, TraceError, dit_config, load_trace, memory_config

GPU_IMPLS = ("triton", "cuda", "sdpa")


def check_table(report: Report, where: str, memory: Memory, layer: int, page_tokens: int, expected: dict) -> None:
    """Hold a layer's table after a pass against the recorded fields that are present."""
    table = memory.tables.layers[layer]
    end, sink = memory.slots_in_use(layer), memory.sink
    keyframe, already, can_fill, action, shifted = table.decision.tolist()
    fields = {
        "local_end_index": end * page_tokens,
        "global_end_index": int(table.seen) * page_tokens,
        "is_keyframe": bool(keyframe),
        "already_added": bool(already),
        "can_fill": bool(can_fill),
        "action": ACTIONS[action],
        "local_roll": bool(shifted),
        "dynamic_context_tokens": int(table.promoted) * page_tokens,
        "token_source_frame": table.sources.tolist(),
        "q_start": int(table.q_positions[0]),
        "k_start": int(table.positions[sink]) if end > sink else -1,
        "sink_frames": min(sink, end),
        "attn_frames": end,
    }
    decides = ("action", "is_keyframe", "token_source_frame") if isinstance(memory.policy, SlowFast) else ()
    for name in ("local_end_index", "global_end_index", *decides):
        if name not in expected:
            raise TraceError(f"{where}: field {name!r} is missing")
    for name, value in fields.items():
        if name in expected:
            report.equal(f"{where} {name}", value, expected[name])
    if "sim" in expected:
        report.similarity(where, float(table.similarity), expected["sim"], memory.policy.rule.threshold)


def slot_norms(memory: Memory, layer: int) -> tuple[Tensor, Tensor]:
    """L2 norms of what each slot shows: keys, values, (slots,) each; rotations do not change them."""
    ids = memory.tables.layers[layer].page_ids.long()
    keys, values = (pages[layer, ids].float().flatten(1).norm(dim=1) for pages in (memory.pool.k, memory.pool.v))
    return keys, values


def raw_keys(memory: Memory, layer: int) -> Tensor:
    """Keys of every slot with the spatial rotation undone: (slots * page_tokens, heads, head_dim)."""
    ids = memory.tables.layers[layer].page_ids.long()
    pages = memory.pool.k[layer, ids].float()
    head_dim = pages.shape[-1]
    table = spatial_table(*memory.grid, head_dim, memory.theta).to(pages.device)
    angle = -torch.atan2(table[..., 1].double(), table[..., 0].double())[:, None]
    return rotate(pages, angle, axis_pairs(head_dim)[0]).flatten(0, 1)


@torch.inference_mode()
def replay_memory(trace: Trace, ops: Ops, dtype: torch.dtype) -> Report:
    """One self-attention module: projections, memory, output projection, pass by pass."""
    config, report = memory_config(trace), Report(dtype)
    module = Attention(config.model)
    state = {name.removeprefix("self_attn."): t for name, t in trace.tensors.items() if name.startswith("self_attn.")}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise TraceError(f"{trace.path}: weights do not fit: {error}") from error
    module.to(trace.device, dtype)
    memory = Memory(config, ops, dtype, trace.device)
    norms = (module.norm_q.weight, module.norm_k.weight)
    inputs, steps = trace.tensor("x").to(dtype), trace.value("steps")
    if len(steps) != len(inputs):
        raise TraceError(f"{trace.path}: {len(inputs)} inputs but {len(steps)} steps")
    frames = config.memory.chunk_frames
    last_pass = trace.meta.get("passes_per_chunk", 5) - 1
    scales = {name: trace.tensor(name).abs().max().item() for name in ("y", "k_repr", "slot_k_norm", "slot_v_norm")}
    for i, (x, expected) in enumerate(zip(inputs, steps, strict=True)):
        if x.shape != (frames * config.page_tokens, config.model.dim):
            raise TraceError(
                f"{trace.path}: x[{i}] is {tuple(x.shape)}, expected {(frames * config.page_tokens, config.model.dim)}"
            )
        step = Pass(expected["start_frame"], clean=expected["pass"] == last_pass)
        attended = memory.attend(0, module.q(x), module.k(x), module.v(x), norms, step)
        results = {"y": module.o(attended.flatten(-2)), "k_repr": memory.tables.layers[0].last_key}
        results["slot_k_norm"], results["slot_v_norm"] = slot_norms(memory, 0)
        for name, got in results.items():
            report.tensor(name, got, trace.tensor(name)[i], scales[name])
        check_table(report, f"pass {i}", memory, 0, config.page_tokens, expected)
    ids = memory.tables.layers[0].page_ids.long()
    report.tensor("final_k", raw_keys(memory, 0), trace.tensor("final_k"))
    report.tensor("final_v", memory.pool.v[0, ids].flatten(0, 1), trace.tensor("final_v"))
    return report


def live_rows(embeds: Tensor) -> Tensor:
    """A padded prompt embedding without its zero rows at the end (at least one row stays)."""
    used = (embeds != 0).any(dim=-1).nonzero()
    return embeds[: int(used[-1]) + 1 if len(used) else 1]


def make_segments(backend: str, config: EngineConfig, model: CausalDiT, ops: Ops) -> TorchSegments | GraphSegments:
    """Segments of a backend; the others export the trace's model into the cache first."""
    if backend == "torch":
        return TorchSegments(model, ops, config.grid)
    from cfengine.export.backend import open_onnx

    return open_onnx(config, model, ops)


class _DitReplay:
    """A whole model and its sampler against a trace."""

    def __init__(self, trace: Trace, ops: Ops, dtype: torch.dtype, backend: str) -> None:
        self.trace, self.config, self.report = trace, dit_config(trace), Report(dtype)
        config = self.config
        self.model = CausalDiT(config.model)
        state = {name.removeprefix("model."): t for name, t in trace.tensors.items() if name.startswith("model.")}
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise TraceError(f"{trace.path}: weights do not fit: {error}") from error
        self.model.to(trace.device, dtype).prepare()
        segments = make_segments(backend, config, self.model, ops)
        schedule = Schedule(config.sampler)
        self.scheduler = ChunkScheduler(self.model, segments, schedule)
        self.memory = Memory(config, ops, dtype, trace.device)
        self.passes = len(schedule.warped) + 1
        if "warped_steps" in trace.meta:
            self.report.tensor("warped_steps", torch.tensor(schedule.warped), torch.tensor(trace.meta["warped_steps"]))
        self.scales = {
            name: trace.tensor(name).abs().max().item()
            for name in ("out.flow_pred", "out.x0", "out.latents", "dbg.slot_norms")
        }

    def part(self, name: str, index: int | slice, got: Tensor) -> None:
        self.report.tensor(name, got, self.trace.tensor(name)[index], self.scales[name])

    def watcher(self, index: int):
        """Compare what pass `index` shows on the way with the recorded intermediate results."""
        prefix, trace = f"dbg.{index:03d}.", self.trace

        def observe(name: str, value: Tensor) -> None:
            if name.endswith(".attended"):
                layer = int(name.removeprefix("layer").removesuffix(".attended"))
                norms = torch.stack(slot_norms(self.memory, layer))
                expected = trace.tensor("dbg.slot_norms")[index, layer]
                self.report.tensor("dbg.slot_norms", norms, expected, self.scales["dbg.slot_norms"])
                return
            if prefix + name in trace.tensors:
                expected = trace.tensors[prefix + name]
                if name == "patch_embedding":
                    expected = expected.flatten(1).T
                self.report.tensor(prefix + name, value, expected)

        return observe

    def check_embeddings(self, index: int, timestep: float, embeds: Tensor) -> None:
        prefix, model = f"dbg.{index:03d}.", self.model
        e = model.embed_time(timestep)
        text = model.text_embedding(embeds.to(model.dtype))
        for name, got in (
            ("time_embedding", e),
            ("time_projection", model.project_time(e).flatten()),
            ("text_embedding", text),
        ):
            if prefix + name in self.trace.tensors:
                self.report.tensor(prefix + name, got, self.trace.tensors[prefix + name])

    def check_pass(self, index: int, timestep: float) -> None:
        expected = self.trace.value("steps")[index]
        if len(expected["layers"]) != self.config.model.layers:
            raise TraceError(
                f"{self.trace.path}: step {index} has {len(expected['layers'])} layers of {self.config.model.layers}"
            )
        report = self.report
        if "start_frame" in expected:
            report.equal(
                f"pass {index} start_frame",
                index // self.passes * self.config.memory.chunk_frames,
                expected["start_frame"],
            )
        if "timestep" in expected:
            report.tensor("timestep", torch.tensor([timestep]), torch.tensor([expected["timestep"]]), 1000.0)
        for layer, fields in enumerate(expected["layers"]):
            check_table(self.report, f"pass {index} layer {layer}", self.memory, layer, self.config.page_tokens, fields)

    def chunk(self, number: int, cross, embeds: Tensor, cut: bool) -> None:
        """All passes of one chunk."""
        frames, first_pass = self.config.memory.chunk_frames, number * self.passes
        start = number * frames
        noise, renoise = self.trace.tensor("in.noise"), self.trace.tensor("in.renoise")
        current = first_pass

        def trace_pass(name: str, value: Tensor) -> None:
            self.watcher(current)(name, value)

        def after_pass(i: int, timestep: float, flow: Tensor, x0: Tensor) -> None:
            nonlocal current
            self.part("out.flow_pred", first_pass + i, flow)
            self.part("out.x0", first_pass + i, x0)
            self.check_pass(first_pass + i, timestep)
            self.check_embeddings(first_pass + i, timestep, embeds)
            current = first_pass + i + 1

        x0 = self.scheduler.denoise(
            self.memory,
            cross,
            start,
            lambda i: noise[start : start + frames] if i == 0 else renoise[number, i - 1],
            cut=cut,
            observe=after_pass,
            trace=trace_pass,
        )
        self.part("out.latents", slice(start, start + frames), x0)
        context = self.scheduler.schedule.context_timestep
        flow, clean = self.scheduler.clean_pass(self.memory, cross, start, x0, cut=cut, full=True, trace=trace_pass)
        after_pass(self.passes - 1, context, flow, clean)

    def run(self) -> Report:
        config, trace = self.config, self.trace
        frames = config.memory.chunk_frames
        chunks = trace.value("frames") // frames
        if len(trace.value("steps")) != chunks * self.passes:
            raise TraceError(f"{trace.path}: {len(trace.value('steps'))} steps, expected {chunks * self.passes}")
        scenes = timeline(trace.meta.get("prompt") or "-", config)
        embeds = trace.tensor("in.prompt_embeds")
        if len(embeds) < len(scenes.scenes):
            raise TraceError(f"{trace.path}: {len(scenes.scenes)} scenes but {len(embeds)} prompt embeddings")
        caches = [self.model.project_text(live_rows(scene)) for scene in embeds]
        for number in range(chunks):
            scene, opens = scenes.at(number)
            if opens:
                self.memory.flush()
            self.chunk(number, caches[scene], embeds[scene], opens and scenes.scenes[scene].cut)
        return self.report


@torch.inference_mode()
def replay_dit(trace: Trace, ops: Ops, dtype: torch.dtype, backend: str) -> Report:
    """Replay a whole-model trace."""
    return _DitReplay(trace, ops, dtype, backend).run()


def replay(
    path: Path, ops: Ops, device: str = "cpu", dtype: torch.dtype = torch.float32, backend: str = "torch"
) -> Report:
    """Replay the trace at `path` on a device, in a type; TraceError where the file is missing or malformed.

    backend: what runs the segments of a whole-model trace
    """
    trace = load_trace(path).to(device)
    try:
        whole = trace.meta["kind"] != "memory"
        report = replay_dit(trace, ops, dtype, backend) if whole else replay_memory(trace, ops, dtype)
        given = ("model.", "self_attn.", "in.")
        report.ignored = [n for n in trace.tensors if n != "x" and not n.startswith(given) and n not in report.errors]
        return report
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise TraceError(f"{path}: malformed trace ({type(error).__name__}: {error})") from error


def expand(arguments: list[str]) -> list[Path]:
    """Files as given; a folder stands for the traces in it (a .safetensors beside a .json)."""
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(path.glob("*.safetensors"))
            if not found:
                raise TraceError(f"{path} holds no .safetensors files")
            paths += found
        else:
            paths.append(path)
    return paths


def replay_device(impl: str | None, device: str | None = None) -> str:
    """Where to replay: on `device`, or else where an implementation runs. TraceError where it cannot.

    A GPU's implementations need one, but for Triton's, which its interpreter runs on the CPU.
    """
    if impl not in GPU_IMPLS and device != "cuda":
        return "cpu"
    if device == "cpu" and not (impl == "triton" and triton_interpreted()):
        raise TraceError(f"implementation {impl!r} does not run on the CPU; leave out --device cpu")
    if device != "cpu" and torch.cuda.is_available():
        return "cuda"
    if impl == "triton" and device != "cuda" and triton_interpreted():
        return "cpu"
    what = f"implementation {impl!r}" if impl in GPU_IMPLS else "--device cuda"
    remedy = "set TRITON_INTERPRET=1 to run it on the CPU" if impl == "triton" else "choose cpu or reference"
    raise TraceError(f"{what} needs a GPU and torch finds none; {remedy}")


def show(write: Callable[[str], object], path: Path, report: Report) -> None:
    """Write a line for each tensor of a trace and for the first mismatches."""
    for name, error in report.errors.items():
        mark = "" if error <= report.tolerance else "  <-- beyond tolerance"
        write(f"{path.name}  {name:32s} {error:.2e}{mark}\n")
    if report.ignored:
        write(f"{path.name}  not compared: {', '.join(report.ignored)}\n")
    for line in report.mismatches[:20]:
        write(f"{path.name}  MISMATCH {line}\n")
    if len(report.mismatches) > 20:
        write(f"{path.name}  ... and {len(report.mismatches) - 20} more mismatches\n")


def run(options: argparse.Namespace, write: Callable[[str], object]) -> int:
    """Replay what the command line asks for; returns the exit code."""
    place = replay_device(options.impl, options.device)
    device = "cuda" if options.impl in GPU_IMPLS else place
    ops, dtype = select(device, prefer=options.impl), DTYPES[options.dtype]
    if options.impl and options.impl not in ops.names.values():
        raise TraceError(f"no operation has an implementation {options.impl!r} on {device} in this build")
    write("operations: " + ", ".join(f"{op}={name}" for op, name in ops.names.items()) + "\n")
    worst, worst_where, tensors, failures, paths = 0.0, "-", 0, 0, expand(options.paths)
    for path in paths:
        report = replay(path, ops, place, dtype, options.backend)
        show(write, path, report)
        tensors += len(report.errors)
        failures += report.failed
        error, name = report.worst
        if error >= worst:
            worst, worst_where = error, f"{path.name}, {name}"
    if failures:
        limit = TOLERANCE[dtype]
        write(f"{failures} of {len(paths)} files differ: beyond {limit:.2g}, or in a table, action or counter\n")
    write(f"{len(paths)} files, {tensors} tensors, worst {worst:.2e} ({worst_where})\n")
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cfengine.testing.replay", description="Replay golden traces.")
    parser.add_argument("paths", nargs="+", metavar="FILE_OR_DIR")
    parser.add_argument(
        "--impl", choices=("reference", "cpu", *GPU_IMPLS), help="implementation to use where it exists"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where model and pages lie; default: as --impl needs")
    parser.add_argument("--backend", choices=("torch", "onnxruntime"), default="torch", help="what runs the segments")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of weights, activations and pages")
    try:
        return run(parser.parse_args(argv), sys.stdout.write)
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
