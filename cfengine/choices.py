"""What a user chooses by name for an engine, checked before anything is built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from cfengine.config import EngineConfig, PrecisionConfig, cache_dir
from cfengine.errors import ConfigError
from cfengine.model.text import CachedTextEncoder, TextEncoder
from cfengine.model.text_tiny import TinyTextEncoder
from cfengine.ops import OPERATIONS

BACKENDS = ("torch", "onnxruntime", "tensorrt", "auto")  # what runs segments; auto: the faster one on this GPU
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


def rounded(config: EngineConfig, backend: str) -> PrecisionConfig:
    """What to round when the model is laid out: TensorRT rounds products by itself, from the weights as they are."""
    if backend in ("tensorrt", "auto"):
        return dataclasses.replace(config.precision, linears="bf16")
    return config.precision


def check_backend(backend: str, exported: str | Path | None = None) -> None:
    """Raise ConfigError for a backend that there is not, or a folder that it does not read."""
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if exported is not None and backend == "torch":
        raise ConfigError(
            f"backend 'torch' reads no export, but exported is {str(exported)!r}; choose 'onnxruntime' or 'tensorrt'"
        )


def check_sessions(max_sessions: int | None) -> None:
    """Raise ConfigError unless it is None or a positive whole number."""
    if max_sessions is not None and (not isinstance(max_sessions, int) or max_sessions < 1):
        raise ConfigError(f"max_sessions is {max_sessions!r}; it must be a whole number from 1 on, or None")


def used_operations(rule: str) -> list[str]:
    """Operations that a pass calls under a rule of the memory."""
    rules = {"slow_fast_update", "slow_fast_paper_update", "slow_fast_diverse_update", "window_update"}
    return [op for op in OPERATIONS if op == rule or op not in rules]


def device_type(device: torch.device | str) -> str:
    """ "cpu" or "cuda"; ConfigError for anything else."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = str(device)
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {str(device)!r}; choose cpu or cuda")
    return kind


def text_encoder(config: EngineConfig, source: str, device: torch.device | str) -> TextEncoder:
    """The encoder that `config.text` names; large ones are loaded when a prompt is not in the cache."""
    if config.text == "tiny_world":
        return TinyTextEncoder.from_file(source)
    if config.text != "umt5":
        raise ConfigError(f"unknown text encoder {config.text!r}; choose tiny_world or umt5")
    model = config.model
    return CachedTextEncoder.umt5(
        source, cache_dir() / "prompts", device=device, text_dim=model.text_dim, text_len=model.text_len
    )


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type that a name or a type means, None for None; ConfigError for one that models do not run in."""
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}; choose float32 or bfloat16")
        return _DTYPES[dtype]
    if dtype is not None and dtype not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype} is not supported; choose float32 or bfloat16")
    return dtype
