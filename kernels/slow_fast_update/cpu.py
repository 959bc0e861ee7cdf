"""The Slow-Fast rule on the CPU, compiled."""

from __future__ import annotations

import torch

from cfengine import _C

from ..operands import check_size, check_tensor
from .reference import SlowFastRule, SlowFastTable

OP = "slow_fast_update"


def slow_fast_update(table: SlowFastTable, key_mean, start_frame: int, rule: SlowFastRule) -> None:
    """See `reference.slow_fast_update`. int32 tables, float32 means."""
    check_tensor(OP, "key_mean", key_mean, 1, (torch.float32,))
    dim = key_mean.shape[0]
    sizes = SlowFastTable(
        page_ids=rule.slots, positions=rule.slots, sources=rule.slots, count=1, q_positions=rule.chunk_frames,
        spare_ids=rule.chunk_frames, promoted=1, seen=1, last_key=dim, decision=5, similarity=1,
    )  # fmt: skip
    for name, tensor, size in zip(SlowFastTable._fields, table, sizes, strict=True):
        check_tensor(OP, name, tensor, 1, (torch.float32 if name in ("last_key", "similarity") else torch.int32,))
        check_size(OP, f"length of {name}", tensor.shape[0], size, "the length that rule and key_mean ask for")
    addresses = [tensor.data_ptr() for tensor in table]
    _C.slow_fast_update(addresses, key_mean.data_ptr(), dim, start_frame, rule[:7], rule.threshold, rule.interval)
