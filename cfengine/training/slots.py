"""Which pages the chunks of a batched sequence see, and at which temporal positions, under each rule of the memory.

A rule that looks at clean keys alone (`slow_fast_paper`), or at none (the windows), can run over all chunks of a
sequence at once. `slow_fast` and `uniform` cannot: what they promote are pages of noisy passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cfengine.config import MemoryConfig

RULES = ("slow_fast_paper", "fifo", "sink_window", "relative_window")


def positions(chunks: int, memory: MemoryConfig) -> tuple[Tensor, Tensor]:
    """Temporal positions of the frames of chunks and of the slots that they see, in the order of `page_table`.

    -> own (chunks, chunk_frames), context (chunks, slots); of a slot that a chunk does not see, any
    """
    c = memory.chunk_frames
    inside = torch.arange(c)
    if memory.policy == "slow_fast_paper":
        anchor = torch.clamp(c * torch.arange(chunks) + c - 1, max=memory.rope_length - 1)
        own = anchor[:, None] - (c - 1) + inside
        sink = torch.arange(memory.sink).expand(chunks, -1)
        past = anchor[:, None] - 2 * c - torch.arange(slow_slots(chunks, memory))
        return own, torch.cat([sink, own - c, past], dim=1)
    frames = window_frames(chunks, memory)
    first = c * torch.arange(chunks)
    if memory.policy == "relative_window":  # a position is the number of a slot
        own = torch.clamp(first + c, max=memory.slots)[:, None] - c + inside
        return own, torch.arange(frames.shape[1]).expand(chunks, -1)
    return first[:, None] + inside, frames


def page_table(key_mean: Tensor, memory: MemoryConfig) -> tuple[Tensor, Tensor]:
    """Which pages each chunk sees besides its own.

    key_mean: (B, chunks, dim), mean raw key of every clean chunk
    -> pages (B, chunks, slots) as frame numbers 0 .. B * chunks * chunk_frames - 1, valid (B, chunks, slots) bool
    """
    B, C, _ = key_mean.shape
    if memory.policy == "slow_fast_paper":
        frames = slow_fast_frames(key_mean, memory)
    else:
        frames = window_frames(C, memory).to(key_mean.device).expand(B, -1, -1)
    of_session = C * memory.chunk_frames * torch.arange(B, device=key_mean.device)
    return frames.clamp(min=0) + of_session[:, None, None], frames >= 0


def slow_slots(chunks: int, memory: MemoryConfig) -> int:
    """Slots of slow memory that a sequence can fill: every second chunk that has left fast memory gives one page."""
    return min(memory.slow, max(0, (chunks - 2) // 2))


def slow_fast_frames(key_mean: Tensor, memory: MemoryConfig) -> Tensor:
    """Frames (B, chunks, slots) in the order sink, fast, slow (newest first), -1 where a slot is empty.

    Sink = chunk 0, fast = the chunk before, slow = first pages of the odd chunks that were unlike the chunk before them
    and have left fast memory. Slots have fixed places, so that only this table depends on the data.
    """
    B, C, _ = key_mean.shape
    c, device, slow = memory.chunk_frames, key_mean.device, slow_slots(C, memory)
    chunk = torch.arange(C, device=device)
    similarity = F.cosine_similarity(key_mean[:, 1:].double(), key_mean[:, :-1].double(), dim=-1)
    marked = torch.cat([similarity.new_zeros(B, 1, dtype=torch.bool), similarity < memory.threshold], dim=1)
    joined = (marked & (chunk % 2 == 1))[:, None] & (chunk <= chunk[:, None] - 2)  # (B, seeing chunk, seen chunk)
    rank = joined.flip(-1).cumsum(-1).flip(-1) - 1  # 0 = newest
    place = torch.where(joined & (rank < slow), rank, slow)
    newest = torch.full((B, C, slow + 1), -1, device=device).scatter(-1, place, (c * chunk).expand(B, C, C))[..., :slow]
    sink = torch.where(chunk[:, None] >= 1, torch.arange(memory.sink, device=device), -1).expand(B, -1, -1)
    before = c * (chunk[:, None] - 1) + torch.arange(c, device=device)
    fast = torch.where(chunk[:, None] >= 2, before, -1).expand(B, -1, -1)
    return torch.cat([sink, fast, newest], dim=-1)


def window_frames(chunks: int, memory: MemoryConfig) -> Tensor:
    """Frames (chunks, slots) in the order of time, -1 where a slot is empty: the first ones and the latest."""
    c, sink = memory.chunk_frames, memory.kept_sink
    first = c * torch.arange(chunks)[:, None]
    slot = torch.arange(min(memory.slots - c, c * (chunks - 1))).expand(chunks, -1)
    skipped = torch.clamp(first + c - memory.slots, min=0)
    frames = torch.where(slot < sink, slot, slot + skipped)
    return torch.where(frames < first, frames, -1)
