"""Where a network is trained: mixed precision on its device, and numbers to report from there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def device_of(net: nn.Module) -> torch.device:
    """The device of a network's parameters."""
    return next(net.parameters()).device


def mixed(device: torch.device) -> AbstractContextManager:
    """Products in bfloat16. Meta tensors, which have sizes and no values, know no mixed precision."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, torch.bfloat16)


def number(value: Tensor) -> float:
    """A value to report; NaN where there is none."""
    return float("nan") if value.is_meta else value.item()
