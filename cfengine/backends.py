"""Backends by name: what runs the segments between the attentions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from cfengine.choices import check_backend
from cfengine.config import EngineConfig
from cfengine.model.dit import CausalDiT
from cfengine.model.text import TextEncoder
from cfengine.ops import Ops
from cfengine.segments.exported import GraphSegments
from cfengine.segments.torch import TorchSegments

Segments = TorchSegments | GraphSegments


def open_backend(
    backend: str,
    config: EngineConfig,
    model: CausalDiT,
    ops: Ops,
    text: TextEncoder,
    queue: AbstractContextManager,
    *,
    exported: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Callable[[Ops], Segments]:
    """What makes segments around given operations.

    ops: what a backend measures and checks itself with      queue: where a GPU's work is queued meanwhile
    backend, exported, progress: see `Engine.from_pretrained`.  Raises ConfigError, ExportError.
    """
    check_backend(backend, exported)
    in_torch = partial(TorchSegments, model, grid=config.grid)
    if backend == "torch":
        return in_torch
    if backend in ("tensorrt", "auto"):
        from cfengine.export.tensorrt_backend import open_fastest, open_tensorrt

        opener = open_tensorrt if backend == "tensorrt" else open_fastest
        with queue:
            found = opener(config, model, ops, text.encode, folder=exported, progress=progress)
        return found.with_ops if found else in_torch
    from cfengine.export.backend import open_onnx  # late: it may need the packages of the extra `export`

    return open_onnx(config, model, ops, folder=exported, progress=progress).with_ops
