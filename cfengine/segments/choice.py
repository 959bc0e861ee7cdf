"""Which backend runs the segments where nobody said: the fastest one measured, remembered for the next start."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from cfengine.errors import CFEngineError
from cfengine.segments.manifest import write_whole


def fastest(measures: Mapping[str, Callable[[], float]], kept: Path, key: Callable[[], str]) -> str:
    """The backend of the least seconds; what was measured under this key before is not measured again.

    measures: backend -> seconds of a pass, in order of preference where two are equally fast      kept: a JSON file,
    key -> backend -> seconds      key(): name of all that the speeds depend on; a measure may change it by building
    A backend that raises one of this package's errors is out, with a warning that says why, and nothing is remembered:
    the next start tries it again. Where all are out, the last of those errors is raised.
    """
    found = _read(kept).get(key(), {})
    if set(found) != set(measures) or not all(found.values()):
        found, refused = {}, {}
        for backend, measure in measures.items():
            try:
                found[backend] = measure()
            except CFEngineError as error:
                refused[backend] = error
        if not found:
            raise refused[backend]
        for backend, error in refused.items():
            warnings.warn(f"backend {backend!r} is out of the choice: {error}", stacklevel=2)
        if not refused:
            _write(kept, _read(kept) | {key(): found})
    return min((backend for backend in measures if backend in found), key=lambda backend: found[backend])


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What is remembered; nothing where the file is not there or cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, memory: dict) -> None:
    """Remember; a cache that cannot be written to costs the next start a measurement."""
    with suppress(OSError):
        write_whole(path, json.dumps(memory, indent=1).encode())
