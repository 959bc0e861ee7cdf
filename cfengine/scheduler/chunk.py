"""The passes of one chunk: denoise, hand over, clean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cfengine.memory.kept import KeptLatents
from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass
from cfengine.memory.replay import Replay
from cfengine.model.dit import CausalDiT, CrossCache, Modulation
from cfengine.ranges import span
from cfengine.scheduler.sampler import Schedule
from cfengine.segments.torch import TorchSegments
from cfengine.segments.walk import walk


class ChunkScheduler:
    """Runs the passes of chunks for any session; modulations are computed once per timestep."""

    def __init__(self, model: CausalDiT, segments: TorchSegments, schedule: Schedule) -> None:
        self.model, self.segments, self.schedule = model, segments, schedule
        self._modulations: dict[float, Modulation] = {}

    def modulation(self, timestep: float) -> Modulation:
        if timestep not in self._modulations:
            self._modulations[timestep] = self.model.modulate(timestep)
        return self._modulations[timestep]

    def _pass(
        self, memory: Memory, x: Tensor, step: Pass, timestep: float, cross, *, full: bool = True, trace=None
    ) -> Tensor | None:
        with span(f"{'clean' if step.clean else 'denoise'} pass at {timestep:.1f}"):
            flow = walk(self.segments, memory, x, step, self.modulation(timestep), cross, full=full, observe=trace)
            memory.end_pass()
        return flow

    @torch.inference_mode()
    def denoise(
        self,
        memory: Memory,
        cross: list[CrossCache],
        start_frame: int | Tensor,
        noise: Callable[[int], Tensor],
        *,
        cut: bool | Tensor = False,
        effort: int = 0,
        observe: Callable[[int, float, Tensor, Tensor], None] | None = None,
        trace=None,
    ) -> Tensor:
        """Noise to x0 in as many passes as the schedule has steps, or as a level of effort leaves of them.

        start_frame, cut: plain values, or (1,) int32 on the device      effort: see `Schedule.efforts`
        noise(i): (frames, channels, height, width) float32, what pass i of the full schedule begins with or is given
        observe(pass, timestep, flow, x0) sees every pass      -> x0 (frames, channels, height, width) float32
        """
        schedule, ops = self.schedule, self.segments.ops
        passes, near = schedule.efforts[effort]
        step = Pass(start_frame, cut=cut, near=near)
        device = memory.device
        x = noise(passes[0]).to(device)
        for i, later in zip(passes, [*passes[1:], None], strict=True):
            timestep = schedule.warped[i]
            flow = self._pass(memory, x, step, timestep, cross, trace=trace)
            x0 = ops.flow_to_x0(x, flow, schedule.sigma(timestep))
            if observe:
                observe(i, timestep, flow, x0)
            if later is not None:
                x = ops.renoise(x0, noise(later).to(device), schedule.sigma(schedule.warped[later]))
        return x0

    @torch.inference_mode()
    def clean_pass(
        self,
        memory: Memory,
        cross: list[CrossCache],
        start_frame: int | Tensor,
        x0: Tensor,
        *,
        cut: bool | Tensor = False,
        full: bool = False,
        trace=None,
    ) -> tuple[Tensor, Tensor] | None:
        """Turn x0 into context: a pass at the context timestep (0) whose keys and values stay.

        It stops at the last block's keys and values; full=True runs to the end and returns (flow, its x0), for replay.
        It reads the whole memory at every level of effort: what it writes is read for as long as its pages stay, and
        nothing writes them again, while those of a denoise pass last until the next pass.
        """
        step, timestep = Pass(start_frame, clean=True, cut=cut), self.schedule.context_timestep
        flow = self._pass(memory, x0, step, timestep, cross, full=full, trace=trace)
        if flow is None:
            return None
        return flow, self.segments.ops.flow_to_x0(x0, flow, self.schedule.sigma(timestep))

    @torch.inference_mode()
    def recache(self, memory: Memory, cross: list[CrossCache], kept: KeptLatents) -> int:
        """Compute again, under a prompt, the pages of all chunks whose latents are kept; -> number of passes.

        One clean pass a chunk that any layer shows, the oldest first; see `Replay`.
        """
        replay = Replay(memory, kept.starts)
        for start in replay.starts:
            replay.begin(start)
            self.clean_pass(replay, cross, start, kept.of(start))
        return len(replay.starts)
