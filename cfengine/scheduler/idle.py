"""Lanes between sessions: what took seconds to capture serves the next ones too."""

from __future__ import annotations

from collections.abc import Hashable

from cfengine.scheduler.device_lane import DeviceLane


class IdleLanes:
    """Lanes that closed sessions have left, by kind, to be used again."""

    def __init__(self, most: int = 1) -> None:
        """most: lanes of a kind that are kept"""
        self._most = most
        self._lanes: dict[Hashable, list[DeviceLane]] = {}

    def keep(self, lane: DeviceLane) -> None:
        """Take the lane of closed sessions; harmless twice. One that is closed, or one too many, is let go."""
        held = self._lanes.setdefault(lane.kind, [])
        if not lane.memories or lane in held:
            return
        if len(held) >= self._most:
            lane.close()
            return
        try:
            lane.reset()
        except RuntimeError:  # the GPU was lost; whoever opens a session next is told
            lane.close()
        else:
            held.append(lane)

    def take(self, kind: Hashable) -> DeviceLane | None:
        """A lane for new sessions, or None where there is none of that kind."""
        held = self._lanes.get(kind)
        return held.pop() if held else None

    def drop(self) -> bool:
        """Let go of all; returns whether there were any."""
        lanes, self._lanes = [lane for held in self._lanes.values() for lane in held], {}
        for lane in lanes:
            lane.close()
        return bool(lanes)
