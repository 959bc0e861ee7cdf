"""Which backend runs the segments where nobody said: the fastest one measured, remembered for the next start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from cfengine.errors import CFEngineError


def fastest(measures: Mapping[str, Callable[[], float]], kept: Path, key: str) -> str:
    """The backend of the least seconds; what was measured under `key` before is not measured again.

    measures: backend -> seconds of a pass, in order of preference where two are equally fast      kept: a JSON file,
    key -> backend -> seconds, null for one that could not run
    A backend that raises one of this package's errors is out; where all are, the last of those errors is raised.
    """
    memory = _read(kept)
    found = memory.get(key, {})
    if set(found) != set(measures) or not any(found.values()):
        found, error = {}, None
        for backend, measure in measures.items():
            try:
                found[backend] = measure()
            except CFEngineError as refused:
                found[backend], error = None, refused
        if error is not None and not any(found.values()):
            raise error
        _write(kept, memory | {key: found})
    able = [backend for backend in measures if found[backend] is not None]
    return min(able, key=lambda backend: found[backend])


def _read(path: Path) -> dict[str, dict[str, float | None]]:
    """What is remembered; nothing where the file is not there or cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, memory: dict) -> None:
    """Remember; a cache that cannot be written to costs the next start a measurement."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(memory, indent=1), encoding="utf-8")
        os.replace(fresh, path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
