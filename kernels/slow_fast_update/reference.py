"""The Slow-Fast rule of one layer: similarity, decision, permutation of the page table."""

from __future__ import annotations

from typing import NamedTuple

import torch

ACTIONS = ("none", "fill", "roll")


class SlowFastRule(NamedTuple):
    """Sizes in latent frames. interval > 0 promotes by frame number instead of by similarity."""

    sink: int
    slow: int
    fast: int
    slots: int
    chunk_frames: int
    keep: int
    rope_length: int
    threshold: float
    interval: int


class SlowFastTable(NamedTuple):
    """Memory of one layer, all on the device. Page 0 is never written: it is what an unused slot shows."""

    page_ids: torch.Tensor  # (slots,) int32
    positions: torch.Tensor  # (slots,) int32 temporal position of each slot
    sources: torch.Tensor  # (slots,) int32 latent frame held, -1 never written
    count: torch.Tensor  # (1,) int32 slots in use; attention reads slots [0, count)
    q_positions: torch.Tensor  # (chunk_frames,) int32
    spare_ids: torch.Tensor  # (chunk_frames,) int32 pages that the next pass writes
    promoted: torch.Tensor  # (1,) int32 slow slots filled by promotion
    seen: torch.Tensor  # (1,) int32 latent frames seen
    last_key: torch.Tensor  # (dim,) float32 key mean of the previous pass
    decision: torch.Tensor  # (5,) int32: keyframe, already promoted, can fill, action (ACTIONS), fast shifted
    similarity: torch.Tensor  # (1,) float32, NaN when not computed


def slow_fast_update(table: SlowFastTable, key_mean, start_frame, rule: SlowFastRule) -> None:
    """Bring the table up to date with a pass whose keys and values were just written to `spare_ids`.

    Follows `wan/modules/causal_model.py` of TIGER-AI-Lab/Context-Forcing (f44bac69), moving page ids where it copies
    data: the cosine of this pass's mean key with that of the previous pass decides on promotion (strictly below the
    threshold), a promotion fills the next slow slot or rolls slow memory, then the chunk enters fast memory, which
    shifts once per chunk when full. Since every pass writes pages that no slot shows, a promoted frame is simply the
    same id in two slots. Positions follow the bounded rule: the query ends at min(last frame, rope_length - 1).

    key_mean: (dim,) float32      start_frame: first latent frame of the chunk, an int or (1,) int32
    table: updated in place
    """
    start_frame = int(start_frame)
    sink, slow, fast, slots, frames, keep, rope_length, threshold, interval = rule
    ids, sources = table.page_ids.tolist(), table.sources.tolist()
    spare = table.spare_ids.tolist()
    end, promoted, seen = int(table.count), int(table.promoted), int(table.seen)

    similarity = float("nan")
    if interval > 0:
        keyframe = start_frame >= fast and start_frame % interval == 0
    elif start_frame < fast:
        keyframe = False
    else:
        mean, last = key_mean.double(), table.last_key.double()
        similarity = float(torch.dot(mean, last) / (mean.norm() * last.norm()).clamp_min(1e-16))
        keyframe = similarity < threshold
    table.last_key.copy_(key_mean)

    already = promoted > 0 and sources[sink + promoted - 1] == start_frame
    can_fill = keep > 0 and sink + promoted + keep + fast <= slots
    action = 0
    if keyframe and not already and keep > 0:
        new_sources = [start_frame + i for i in range(keep)]
        if can_fill:
            action, low = 1, sink + promoted
            promoted += keep
        elif slow > keep:
            action, low = 2, slots - fast - keep
            ids[sink:low] = ids[sink + keep : slots - fast]
            sources[sink:low] = sources[sink + keep : slots - fast]
        if action:
            ids[low : low + keep] = spare[:keep]
            sources[low : low + keep] = new_sources

    new = start_frame + frames > seen
    shift = new and end + frames > slots
    if shift:
        ids[slots - fast : slots - frames] = ids[slots - fast + frames : slots]
        sources[slots - fast : slots - frames] = sources[slots - fast + frames : slots]
        end -= frames
    end += start_frame + frames - seen
    seen = start_frame + frames
    ids[end - frames : end] = spare
    sources[end - frames : end] = range(start_frame, start_frame + frames)

    used = set(ids)
    free = [page for page in range(1, slots + frames + 1) if page not in used]

    anchor = min(start_frame + frames - 1, rope_length - 1)
    rest = max(0, anchor - (end - sink) + 1)
    positions = [slot if slot < sink else rest + slot - sink for slot in range(slots)]
    first_query = max(0, anchor - frames + 1)

    for tensor, values in (
        (table.page_ids, ids),
        (table.positions, positions),
        (table.sources, sources),
        (table.count, [end]),
        (table.q_positions, [first_query + i for i in range(frames)]),
        (table.spare_ids, free[:frames]),
        (table.promoted, [promoted]),
        (table.seen, [seen]),
        (table.decision, [keyframe, already, can_fill, action, shift]),
        (table.similarity, [similarity]),
    ):
        tensor.copy_(torch.tensor(values, dtype=tensor.dtype))
