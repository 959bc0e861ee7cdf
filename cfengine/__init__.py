"""Live AI video: a runtime for autoregressive video diffusion with a long memory.

from cfengine import Engine

with Engine.from_pretrained("tiny-world") as engine:
    for frame in engine.stream("pan right over a desert at sunset", num_frames=81):
        ...  # frame.pixels: (height, width, 3) uint8
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfengine.config import EngineConfig
    from cfengine.engine import Engine
    from cfengine.events import Prompt, Reset
    from cfengine.session import Session
    from cfengine.snapshot import Snapshot
    from cfengine.types import Frame

__version__ = "0.1.0"
__all__ = ["Engine", "EngineConfig", "Frame", "Prompt", "Reset", "Session", "Snapshot", "__version__"]
_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir():  # a checkout: kernels, export and bench lie beside this folder, installed or not
    __path__.append(str(_HERE.parent))
_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "Frame": "types",
    "Prompt": "events",
    "Reset": "events",
    "Session": "session",
    "Snapshot": "snapshot",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import cfengine` and the command line stay light."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"cfengine.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cfengine' has no attribute {name!r}")
