"""Golden traces: recorded runs of reference implementations, a `.safetensors` with a `.json` of the same stem.

Kinds: `memory` (one self-attention module under the Slow-Fast rule) and `dit` (a whole model with its sampler). The
repositories behind the short names are Context-Forcing (cf), Self-Forcing (sf), LongLive (ll, and lli for its infinity
file) and Infinity-RoPE (ir).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
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
    except (ValueError, UnicodeDecodeError) as error:
        raise TraceError(f"{description} is not JSON: {error}") from error
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise TraceError(f"{path} is not a safetensors file: {error}") from error
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


# What the official code takes where a trace does not say: (kind of repository) -> model_kwargs
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cf": {
        "local_attn_size": 6,
        "sink_size": 3,
        "rope_length": 21,
        "cache_size": 21,
        "keyframe_interval": 0,
        "num_new_context_tokens": 1,
        "keyframe_sample": "sim",
    },
    "sf": {"local_attn_size": -1, "sink_size": 0},
    "ll": {"local_attn_size": 12, "sink_size": 3},
    "lli": {"local_attn_size": 12, "sink_size": 3},
    "ir": {"local_attn_size": -1, "sink_size": 1},
}
_POLICIES = {"sf": "fifo", "ll": "sink_window", "lli": "relative_window", "ir": "relative_window"}


def dit_config(trace: Trace) -> EngineConfig:
    """Configuration of a `dit` trace."""
    value, repo = trace.value, trace.value("repo")
    if repo not in _DEFAULTS:
        raise TraceError(f"{trace.path.with_suffix('.json')}: repo is {repo!r}, expected one of {', '.join(_DEFAULTS)}")
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
        memory=_dit_memory(repo, value("chunk_frames"), _DEFAULTS[repo] | trace.meta.get("model_kwargs", {})),
        sampler=SamplerConfig(
            steps=tuple(trace.meta.get("denoising_step_list", (1000, 750, 500, 250))),
            shift=trace.meta.get("timestep_shift", 5.0),
            warp=trace.meta.get("warp_denoising_step", True),
            context_timestep=float(trace.meta.get("context_noise", 0)),
        ),
        video=VideoConfig(width=width * 8, height=height * 8),
    )


def _dit_memory(repo: str, chunk_frames: int, kwargs: dict[str, Any]) -> MemoryConfig:
    """Map the official model_kwargs to a policy; rope_length 0 makes the Context Forcing code a Self-Forcing window."""
    if repo == "cf" and not kwargs["rope_length"]:
        repo, kwargs = "sf", {"local_attn_size": kwargs["cache_size"], "sink_size": 0}
    if repo == "cf":
        by_similarity = kwargs["keyframe_sample"] == "sim"
        return MemoryConfig(
            policy="slow_fast" if by_similarity else "uniform",
            sink=kwargs["sink_size"],
            fast=kwargs["local_attn_size"],
            slow=kwargs["cache_size"] - kwargs["sink_size"] - kwargs["local_attn_size"],
            chunk_frames=chunk_frames,
            rope_length=kwargs["rope_length"],
            keep=kwargs["num_new_context_tokens"],
            interval=0 if by_similarity else kwargs["keyframe_interval"],
            slots_override=kwargs["cache_size"],
        )
    window = 21 if kwargs["local_attn_size"] == -1 else kwargs["local_attn_size"]
    sink = kwargs["sink_size"]
    return MemoryConfig(
        policy=_POLICIES[repo], sink=sink, slow=0, fast=window - sink, chunk_frames=chunk_frames, slots_override=window
    )
