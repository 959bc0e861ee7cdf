"""Numbers of the C interface (csrc/client/include/cfengine_client.h) by name."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class State(IntEnum):
    """How the writer does. STALLED is found by readers: running, and silent for longer than the ring allows."""

    LOADING = 1
    READY = 2
    RUNNING = 3
    PAUSED = 4
    STALLED = 5
    ERROR = 6
    ENDED = 7


class Format(IntEnum):
    """How pixels lie: RGBA bytes, or Y and interleaved UV at half size (BT.709, limited range)."""

    RGBA8 = 1
    NV12 = 2


class Memory(IntEnum):
    """Where frames lie: in memory that every program maps, or on a GPU, for CUDA alone or for Vulkan too."""

    HOST = 1
    CUDA_IPC = 2
    OPAQUE_FD = 3


class Policy(IntEnum):
    """Which frame a reader wants: the newest, the next that it has not had, or the nearest to a display time."""

    LATEST = 0
    NEXT = 1
    NEAREST = 2


class Flags(IntFlag):
    """What is to be known of a frame: shown before, not following the one before, or ready after its time."""

    NONE = 0
    REPEATED = 1
    DISCONTINUITY = 2
    LATE = 4
