"""Check of a table and a key mean, shared by the compiled kernels of every rule."""

from __future__ import annotations

import torch

from ..operands import check_size, check_tensor
from .reference import SlowFastTable

OP = "slow_fast_update"


def check_table(table: SlowFastTable, key_mean, rule, device: str = "cpu", op: str = OP) -> None:
    """Raise KernelError unless table and key_mean (dim,) have the types of `SlowFastTable` and the sizes of `rule`."""
    check_tensor(op, "key_mean", key_mean, 1, (torch.float32,), device)
    sizes = SlowFastTable(
        page_ids=rule.slots, positions=rule.slots, sources=rule.slots, count=1, q_positions=rule.chunk_frames,
        spare_ids=rule.chunk_frames, promoted=1, seen=1, last_key=key_mean.shape[0], decision=5, similarity=1,
    )  # fmt: skip
    for name, tensor, size in zip(SlowFastTable._fields, table, sizes, strict=True):
        kind = torch.float32 if name in ("last_key", "similarity") else torch.int32
        check_tensor(op, name, tensor, 1, (kind,), device)
        check_size(op, f"length of {name}", tensor.shape[0], size, "the length that rule and key_mean ask for")
