"""What an engine is made of, from a name: its configuration, and weights, codec and text encoder loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from cfengine.choices import device_type, dtype_of, text_encoder
from cfengine.codec import Codec, load_codec
from cfengine.config import EngineConfig, precision, with_policy
from cfengine.device import check_fits, device_errors
from cfengine.model.dit import CausalDiT
from cfengine.model.text import TextEncoder
from cfengine.model.weights import load_dit
from cfengine.sources import config_of, sources_of


class Parts(NamedTuple):
    """What `Engine` takes; dtype: of the model."""

    model: CausalDiT
    codec: Codec
    text: TextEncoder
    dtype: torch.dtype


def configured(
    name: str,
    given: EngineConfig | None,
    *,
    policy: str | None,
    size: tuple[int, int] | None,
    precision_name: str | None,
    taehv: bool,
) -> EngineConfig:
    """The configuration of the model called `name`, or the given one, with what is to differ.

    See `Engine.from_pretrained`.  Raises ConfigError, CheckpointError.
    """
    config = given or config_of(name)
    if policy is not None:
        config = dataclasses.replace(config, memory=with_policy(config.memory, policy))
    if size is not None:
        config = dataclasses.replace(config, video=dataclasses.replace(config.video, width=size[0], height=size[1]))
    if precision_name is not None:
        config = dataclasses.replace(config, precision=precision(precision_name))
    return dataclasses.replace(config, codec="taehv") if taehv else config


def load(
    name: str,
    config: EngineConfig,
    device: torch.device | str,
    dtype: torch.dtype | str | None,
    taehv: str | Path | None,
) -> Parts:
    """Load the parts of the model called `name` to a device.

    dtype: None for that of the model's kind      taehv: where the weights of such a codec are
    Raises ConfigError, CheckpointError, DeviceError.
    """
    sources = sources_of(name, config)
    kind = dtype_of(dtype) or (torch.float32 if sources.small else torch.bfloat16)
    with torch.device("meta"):
        model = CausalDiT(config.model)
    if device_type(device) == "cuda":
        needed = sum(p.numel() for p in model.parameters()) * kind.itemsize
        check_fits(f"the model of {config.name!r}", needed, config, device, kind.itemsize)
    with device_errors(config, device, kind.itemsize):
        model.load_state_dict(load_dit(sources.dit, config.model, dtype=kind, device=device), assign=True)
        encoder = text_encoder(config, sources.text, device)
        exact = torch.float32 if device_type(device) == "cpu" else kind
        return Parts(model, load_codec(config, str(taehv or sources.codec), device, exact), encoder, kind)
