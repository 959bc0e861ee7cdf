"""The paper's Slow-Fast rule of one layer, but a full slow memory drops what it holds twice."""

from __future__ import annotations

import torch

from ..slow_fast_paper_update.reference import PaperRule, slow_fast_paper_update
from ..slow_fast_update.reference import SlowFastTable


def slow_fast_diverse_update(
    table: SlowFastTable, marked, descriptors, key_mean, start_frame, rule: PaperRule, *, clean: bool
):
    """Bring the table up to date with a pass whose keys and values were just written to `spare_ids`.

    `slow_fast_paper_update`, with one change: where a page joins a slow memory that is full, the oldest does not leave.
    Of the slow pages and the one that joins, two have the greatest cosine of descriptors, and the older of these
    leaves; the others keep their order. A view that returns so replaces its own old page, and the same number of pages
    spans more time. A page's descriptor is the mean key of its chunk's clean pass.

    marked: (slots,) int32, 1 where the page will join slow memory      key_mean: (dim,) float32, compared when clean
    descriptors: (slots + chunk_frames + 1, dim) float32, by page id, so that they stay where they are as pages do
    start_frame: first latent frame of the chunk, an int or (1,) int32
    table, marked, descriptors: updated in place
    """
    put_first_to_leave(table, marked, descriptors, key_mean, start_frame, rule, clean=clean)
    slow_fast_paper_update(table, marked, key_mean, start_frame, rule, clean=clean)


def put_first_to_leave(table: SlowFastTable, marked, descriptors, key_mean, start_frame, rule: PaperRule, *, clean):
    """Before the paper's rule: describe the pages just written, and move the page that will leave to the oldest place.

    That is all the rule needs to drop this page instead. Operations on tensors alone, of fixed shapes, so that a
    captured CUDA graph holds them: nothing is read by the host, and a case that does not arise is an order left as is.
    At most one page joins a pass: chunks' first pages are marked, and no more than a chunk leaves fast memory.
    """
    if clean:  # spare_ids are still the pages that this pass wrote
        descriptors[table.spare_ids.long()] = key_mean
    sink, slow, fast, _, frames, *_ = rule
    if slow < 2:  # the older of two is the oldest
        return
    device = key_mean.device
    low = sink + slow  # the first fast slot of a full slow memory
    entering = start_frame + frames > table.seen
    leaving = torch.arange(frames, device=device) < table.count + frames - low - fast
    joins = (marked[low : low + frames] != 0) & leaving & entering & (table.promoted == slow)

    joining = table.page_ids[low : low + frames].gather(0, joins.int().argmax(0, keepdim=True))
    held = table.page_ids[sink:low]
    place = likest(descriptors[torch.cat((held, joining)).long()])
    slot = torch.arange(slow, device=device)
    moved = torch.where(slot == 0, place, torch.where(slot <= place, slot - 1, slot))
    order = torch.where(joins.any(), moved, slot)
    for entries in (held, table.sources[sink:low]):  # every slow page is marked
        entries.copy_(entries.gather(0, order))


def likest(descriptors: torch.Tensor) -> torch.Tensor:
    """Row of the older page of the pair with the greatest cosine; of equal ones, the oldest.

    descriptors: (pages, dim), oldest first -> () int64, never the last row
    """
    wide = descriptors.double()
    unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-8)
    # rounded: copies of a page are equal whatever order a device sums in, and ties go to the oldest everywhere
    cosines = (unit @ unit.T * 1e9).round()
    older = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    return cosines.masked_fill(~older, float("-inf")).amax(1)[:-1].argmax()
