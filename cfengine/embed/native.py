"""The compiled half of the ring, or the sentence that says how to build it."""

from __future__ import annotations

from types import ModuleType

from cfengine.errors import RingError


def load() -> ModuleType:
    """Return `cfengine._C`; RingError where it is not built, or was built before it had a ring."""
    try:
        from cfengine import _C
    except ImportError as error:
        reason = str(error)
    else:
        if hasattr(_C, "RingWriter"):
            return _C
        reason = f"{_C.__file__} was built from older sources"
    raise RingError(
        f"the frame ring is not available ({reason}); "
        "build the extension with a C++ compiler and cmake present: pip install -e ."
    )


def now_ns() -> int:
    """The clock of every time in a ring, in nanoseconds; on Linux that of `time.monotonic_ns`."""
    return load().ring_now_ns()
