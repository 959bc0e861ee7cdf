"""Linear layer on e4m3 operands through the library: `torch._scaled_mm` (cuBLASLt, or CUTLASS inside torch).

Scales a row and a column are part of the library's product where device and torch have that (Hopper from torch 2.6 on,
Ada and Blackwell with later ones). Elsewhere the product runs with scales of one into float32, and the scales and the
bias follow in a pass over the result: the same meaning, but the result is written and read once more.
"""

from __future__ import annotations

from functools import cache

import torch

from cfengine.errors import KernelError

from ..fp8 import E4M3
from ..operands import check_divides, check_size, check_tensor

OP = "linear_fp8"
OLDEST = (8, 9)  # compute capability with e4m3 on its tensor cores
MULTIPLE = 16  # of input and output channels, as the library wants them


def linear_fp8(rows, scale, weight, weight_scale, bias=None, *, dtype=torch.bfloat16):
    """See `reference.linear_fp8`. bfloat16 results; input and output channels are multiples of 16."""
    _check(rows, scale, weight, weight_scale, bias, dtype)
    if by_row(rows.device):
        return torch._scaled_mm(
            rows, weight.t(), scale[:, None], weight_scale[None], bias=bias, out_dtype=dtype, use_fast_accum=False
        )
    one = _one(rows.device)
    out = torch._scaled_mm(rows, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)
    out = out * scale[:, None] * weight_scale
    return (out if bias is None else out + bias).to(dtype)


def _check(rows, scale, weight, weight_scale, bias, dtype) -> None:
    device = rows.device.type
    for name, part in (("rows", rows), ("weight", weight)):
        check_tensor(OP, name, part, 2, (E4M3,), device)
    for name, part, size, meaning in (
        ("scale", scale, rows.shape[0], "tokens of rows"),
        ("weight_scale", weight_scale, weight.shape[0], "output channels of weight"),
    ):
        check_tensor(OP, name, part, 1, (torch.float32,), device)
        check_size(OP, f"length of {name}", part.shape[0], size, meaning)
    check_size(OP, "input channels of weight", weight.shape[1], rows.shape[1], "width of rows")
    check_divides(OP, "input channels", weight.shape[1], "what the library takes", MULTIPLE)
    check_divides(OP, "output channels", weight.shape[0], "what the library takes", MULTIPLE)
    if bias is not None:
        check_tensor(OP, "bias", bias, 1, (dtype,), device)
        check_size(OP, "length of bias", bias.shape[0], weight.shape[0], "output channels of weight")
    if dtype != torch.bfloat16:
        wanted = str(dtype).removeprefix("torch.")
        raise KernelError(f"{OP}: the result is to be {wanted}, but the library gives bfloat16; load a bfloat16 model")


@cache  # kept: a captured graph holds the address
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


@cache
def by_row(device: torch.device) -> bool:
    """Whether the library of this torch takes scales by row and column on a device; tries it once, before any capture.

    KernelError where the device has no e4m3 products at all.
    """
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        name = torch.cuda.get_device_name(device)
        has, need = (".".join(map(str, capability)) for capability in (found, OLDEST))
        raise KernelError(
            f"{OP}: {name} has compute capability {has} but e4m3 products need {need}; choose precision 'bf16'"
        )
    operand = torch.zeros((MULTIPLE, MULTIPLE), dtype=E4M3, device=device)
    scale = torch.ones((MULTIPLE, 1), device=device)
    try:
        torch._scaled_mm(operand, operand.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True
