"""Golden traces: recorded runs of reference implementations, a `.safetensors` with a `.json` of the same stem.

Kinds: `memory` (one self-attention module under the Slow-Fast rule) and `dit` (a whole model with its sampler). The
repositories behind the short names are Context-Forcing (cf), Self-Forcing (sf), LongLive (ll, and lli for its infinity
file) and Infinity-RoPE (ir).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, SamplerConfig, VideoConfig
from cfengine.errors import CFEngineError


class TraceError(CFEngineError):
    """A trace that is missing, malformed or of an unknown kind."""


@dataclass(frozen=True)
class Trace:
    """One golden file: its tensors and its description."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, device: str) -> Trace:
        """The same trace with its tensors on a device."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise TraceError(f"{self.path}: tensor {name!r} is missing")
        return self.tensors[name]

    def value(self, name: str) -> Any:
        if name not in self.meta:
            raise TraceError(f"{self.path.with_suffix('.json')}: field {name!r} is missing")
        return self.meta[name]


def load_trace(path: Path) -> Trace:
    """Read a trace; TraceError says which of its two files is missing or malformed."""
    description = path.with_suffix(".json")
    for file in (path, description):
        if not file.is_file():
            raise TraceError(f"{file} does not exist; a trace is a .safetensors and a .json of the same stem")
    try:
        meta = json.loads(description.read_text())
    except (OSError, ValueError) as error:
        raise TraceError(f"{description} cannot be read as JSON: {error}") from error
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise TraceError(f"{path} is not a safetensors file: {error}") from error
    if not tensors:
        raise TraceError(f"{path} holds no tensors; record the trace again")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise TraceError(f"{path}: tensor {name!r} is {dtype} but traces are float32; record the trace again")
    if not isinstance(meta, dict) or meta.get("kind") not in ("memory", "dit"):
        kind = meta.get("kind") if isinstance(meta, dict) else type(meta).__name__
        raise TraceError(f"{description}: kind is {kind!r}, expected 'memory' or 'dit'")
    return Trace(path, meta, tensors)


def memory_config(trace: Trace) -> EngineConfig:
    """Configuration of a `memory` trace."""
    value = trace.value
    rows, columns = value("grid")
    by_similarity = value("keyframe_sample") == "sim"
    return EngineConfig(
        name=trace.path.stem,
        model=ModelConfig(
            dim=value("dim"),
            ffn_dim=4,
            heads=value("num_heads"),
            layers=1,
            eps=value("eps"),
            text_dim=4,
            text_len=4,
            freq_dim=4,
        ),
        memory=MemoryConfig(
            policy="slow_fast" if by_similarity else "uniform",
            sink=value("sink"),
            slow=value("slow"),
            fast=value("fast"),
            chunk_frames=value("chunk_frames"),
            rope_length=value("rope_length"),
            keep=value("num_new_context_frames"),
            threshold=value("threshold"),
            interval=0 if by_similarity else value("keyframe_interval"),
            slots_override=value("cache"),
        ),
        video=VideoConfig(width=columns * 16, height=rows * 16),
    )


# model_kwargs of a trace that names none: what the repository's own configuration file passes ...
_CONFIGURED: dict[str, dict[str, Any]] = {
    "cf": {
        "local_attn_size": 6,
        "sink_size": 3,
        "rope_length": 21,
        "cache_size": 21,
        "keyframe_interval": 0,
        "num_new_context_tokens": 1,
        "keyframe_sample": "sim",
    },
    "sf": {},
    "ll": {"local_attn_size": 12, "sink_size": 3},
    "lli": {"local_attn_size": 12, "sink_size": 3},
    "ir": {"local_attn_size": 6, "sink_size": 1},
}
# ... and what a model takes for an argument that is not passed
_UNSET = {"local_attn_size": -1, "sink_size": 0}
_POLICIES = {"ll": "sink_window", "lli": "relative_window", "ir": "relative_window"}


def dit_config(trace: Trace) -> EngineConfig:
    """Configuration of a `dit` trace."""
    value, repo = trace.value, trace.value("repo")
    if repo not in _CONFIGURED:
        raise TraceError(
            f"{trace.path.with_suffix('.json')}: repo is {repo!r}, expected one of {', '.join(_CONFIGURED)}"
        )
    model = value("model")
    height, width = value("latent_hw")
    return EngineConfig(
        name=trace.path.stem,
        model=ModelConfig(
            dim=model["dim"],
            ffn_dim=model["ffn_dim"],
            heads=model["num_heads"],
            layers=model["num_layers"],
            in_channels=model.get("in_dim", 16),
            out_channels=model.get("out_dim", 16),
            patch=tuple(model.get("patch_size", (1, 2, 2))),
            text_dim=model["text_dim"],
            text_len=model["text_len"],
            freq_dim=model["freq_dim"],
            eps=model.get("eps", 1e-6),
        ),
        memory=_dit_memory(repo, value("chunk_frames"), _model_kwargs(repo, trace.meta.get("model_kwargs"))),
        sampler=SamplerConfig(
            steps=tuple(trace.meta.get("denoising_step_list", (1000, 750, 500, 250))),
            shift=trace.meta.get("timestep_shift", 5.0),
            warp=trace.meta.get("warp_denoising_step", True),
            context_timestep=float(trace.meta.get("context_noise", 0)),
        ),
        video=VideoConfig(width=width * 8, height=height * 8),
    )


def _model_kwargs(repo: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """Complete the official keyword arguments of a trace."""
    if given is None:
        return _UNSET | _CONFIGURED[repo]
    return (_CONFIGURED["cf"] if repo == "cf" else _UNSET) | given


def _dit_memory(repo: str, chunk_frames: int, kwargs: dict[str, Any]) -> MemoryConfig:
    """Map the official model_kwargs to a policy; rope_length 0 makes the Context Forcing code a plain window."""
    sink = kwargs["sink_size"]
    if repo == "cf" and kwargs["rope_length"]:
        by_similarity = kwargs["keyframe_sample"] == "sim"
        slots = kwargs["cache_size"] or 21
        return MemoryConfig(
            policy="slow_fast" if by_similarity else "uniform",
            sink=sink,
            fast=kwargs["local_attn_size"],
            slow=slots - sink - kwargs["local_attn_size"],
            chunk_frames=chunk_frames,
            rope_length=kwargs["rope_length"],
            keep=kwargs["num_new_context_tokens"],
            interval=0 if by_similarity else kwargs["keyframe_interval"],
            slots_override=slots,
        )
    window = kwargs["cache_size"] or 21 if repo == "cf" else kwargs["local_attn_size"]
    window = 21 if window == -1 else window
    return MemoryConfig(
        policy=_POLICIES.get(repo, "sink_window" if sink else "fifo"),
        sink=sink,
        slow=0,
        fast=window - sink,
        chunk_frames=chunk_frames,
        slots_override=window,
        scenes=repo == "ir",
    )
