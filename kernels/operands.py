"""Checks of operands, shared by the compiled kernels: a message names the operand, both numbers and the remedy."""

from __future__ import annotations

import torch

from cfengine.errors import KernelError

FLOATS = (torch.float32, torch.bfloat16)
GPU_FLOATS = (*FLOATS, torch.float16)


def check_tensor(op: str, name: str, tensor, dims: int, dtypes, device: str = "cpu") -> None:
    """Raise KernelError unless `tensor` has `dims` axes, one of `dtypes`, the device type and a unit last stride."""
    if tensor.device.type != device:
        where = f"{name} is on {tensor.device} but this implementation runs on {device}"
        raise KernelError(f"{op}: {where}; move it with .to({device!r})")
    if tensor.dim() != dims:
        found = f"{tensor.dim()} axes, shape {tuple(tensor.shape)}"
        raise KernelError(f"{op}: {name} has {found}, but {dims} are expected; reshape it")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        remedy = "cast it, or choose implementation 'reference'"
        raise KernelError(f"{op}: {name} is {got} but {wanted} is expected; {remedy}")
    if dims and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        stride = tensor.stride(-1)
        raise KernelError(f"{op}: the last stride of {name} is {stride} but must be 1; call .contiguous() on it")


def refuse_fp8(op: str, fp8: bool) -> None:
    """Raise KernelError where e4m3 is asked of an implementation without it."""
    if fp8:
        raise KernelError(f"{op}: this implementation has no e4m3; choose implementation 'reference'")


def check_size(op: str, name: str, found: int, expected: int, meaning: str) -> None:
    """Raise KernelError unless a size is the one that `meaning` asks for."""
    if found != expected:
        raise KernelError(f"{op}: {name} is {found} but {meaning} is {expected}; they must agree")


def check_latents(op: str, parts: dict, dtypes) -> list:
    """Return tensors of one shape and device as contiguous ones; KernelError where they differ or have other types."""
    (first_name, first), *_ = parts.items()
    for name, part in parts.items():
        if part.shape != first.shape:
            shapes = f"{name} is {tuple(part.shape)} but {first_name} is {tuple(first.shape)}"
            raise KernelError(f"{op}: {shapes}; they must agree")
    dense = {name: part.contiguous() for name, part in parts.items()}
    for name, part in dense.items():
        check_tensor(op, name, part, first.dim(), dtypes, first.device.type)
    return list(dense.values())


def check_divides(op: str, name: str, value: int, part_name: str, part: int) -> None:
    """Raise KernelError unless `part` divides `value`."""
    if part < 1 or value % part:
        raise KernelError(f"{op}: {name} {value} is not a multiple of {part_name} {part}; pass whole frames")


def float_rows(op: str, name: str, tensor, dim: int):
    """Return (frames, dim) per-frame factors as float32 with a unit last stride."""
    check_tensor(op, name, tensor, 2, FLOATS)
    check_size(op, f"width of {name}", tensor.shape[1], dim, "width of x")
    return tensor.float()


def float_vector(op: str, name: str, tensor, dim: int):
    """Return (dim,) weights as float32 with a unit stride."""
    check_tensor(op, name, tensor, 1, FLOATS)
    check_size(op, f"length of {name}", tensor.shape[0], dim, "width of k")
    return tensor.float()


def on_device(value, device: torch.device):
    """A whole number or flag as (1,) int32 on a device; a tensor, which a captured graph can read anew, as it is."""
    return value if torch.is_tensor(value) else torch.tensor([int(value)], dtype=torch.int32, device=device)
