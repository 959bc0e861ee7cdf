"""The rule on a GPU: an order of the slow pages in torch, then the kernel of the paper's rule. No word to the host.

The order is a few dozen small launches a layer and pass, which a captured graph replays; a kernel of its own would make
them one.
"""

from __future__ import annotations

from ..operands import check_size, check_tensor, on_device
from ..slow_fast_paper_update.reference import PaperRule
from ..slow_fast_paper_update.triton import slow_fast_paper_update
from ..slow_fast_update.reference import SlowFastTable
from .reference import put_first_to_leave

OP = "slow_fast_diverse_update"


def slow_fast_diverse_update(
    table: SlowFastTable, marked, descriptors, key_mean, start_frame, rule: PaperRule, *, clean: bool
):
    """See `reference.slow_fast_diverse_update`. start_frame may be a (1,) int32 tensor on the device.

    An int is copied to the device first, which a captured graph would freeze.
    """
    device = key_mean.device
    check_tensor(OP, "descriptors", descriptors, 2, (key_mean.dtype,), device.type)
    check_size(OP, "rows of descriptors", descriptors.shape[0], rule.slots + rule.chunk_frames + 1, "pages")
    start = on_device(start_frame, device)
    put_first_to_leave(table, marked, descriptors, key_mean, start, rule, clean=clean)
    slow_fast_paper_update(table, marked, key_mean, start, rule, clean=clean)
