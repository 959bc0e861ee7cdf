"""The Slow-Fast rule on the CPU, compiled."""

from __future__ import annotations

from cfengine import _C

from .operands import check_table
from .reference import SlowFastRule, SlowFastTable


def slow_fast_update(table: SlowFastTable, key_mean, start_frame, rule: SlowFastRule) -> None:
    """See `reference.slow_fast_update`. int32 tables, float32 means."""
    check_table(table, key_mean, rule)
    addresses = [tensor.data_ptr() for tensor in table]
    dim = key_mean.shape[0]
    start = int(start_frame)
    _C.slow_fast_update(addresses, key_mean.data_ptr(), dim, start, rule[:7], rule.threshold, rule.interval)
