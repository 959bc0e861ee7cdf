"""Lanes between sessions: what took seconds to capture serves the next ones too."""

from __future__ import annotations

from cfengine.scheduler.device_lane import DeviceLane


class IdleLanes:
    """Lanes that closed sessions have left, at most one for each number of sessions, to be used again."""

    def __init__(self) -> None:
        self._lanes: dict[int, DeviceLane] = {}

    def keep(self, lane: DeviceLane) -> None:
        """Take the lane of closed sessions; harmless twice. One that is closed, or one too many, is let go."""
        if not lane.memories or lane in self._lanes.values():
            return
        if len(lane.memories) in self._lanes:
            lane.close()
            return
        try:
            lane.reset()
        except RuntimeError:  # the GPU was lost; whoever opens a session next is told
            lane.close()
        else:
            self._lanes[len(lane.memories)] = lane

    def take(self, seeds: list[int]) -> DeviceLane | None:
        """A lane for new sessions, one a seed, or None where there is none of that size."""
        lane = self._lanes.pop(len(seeds), None)
        if lane is not None:
            lane.expect(seeds)
        return lane

    def drop(self) -> bool:
        """Let go of all; returns whether there were any."""
        lanes, self._lanes = [*self._lanes.values()], {}
        for lane in lanes:
            lane.close()
        return bool(lanes)
