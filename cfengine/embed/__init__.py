"""The frame ring: live frames in shared memory for programs without Python, and their events back.

`Ring` is the writer's side, `Reader` the other one, for tests and tools; games link `csrc/client` (docs/embed.md).
"""

from __future__ import annotations

from cfengine.embed.cuda_memory import DeviceHandle
from cfengine.embed.events import ActionEvent, Event, PauseEvent, PoseEvent, PromptEvent, ResetEvent, ResumeEvent
from cfengine.embed.names import Flags, Format, Memory, Policy, State
from cfengine.embed.native import now_ns
from cfengine.embed.reader import Reader, RingFrame, RingState
from cfengine.embed.ring import Ring, RingStats

__all__ = [
    "ActionEvent",
    "DeviceHandle",
    "Event",
    "Flags",
    "Format",
    "Memory",
    "PauseEvent",
    "Policy",
    "PoseEvent",
    "PromptEvent",
    "Reader",
    "ResetEvent",
    "ResumeEvent",
    "Ring",
    "RingFrame",
    "RingState",
    "RingStats",
    "State",
    "now_ns",
]
