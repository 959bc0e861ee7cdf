"""Inputs of the Slow-Fast rule: rules of every size, tables at the start, and passes over chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .reference import SlowFastRule, SlowFastTable


def rule(sink=3, slow=12, fast=6, chunk_frames=3, keep=1, rope_length=21, threshold=0.95, interval=0) -> SlowFastRule:
    """Return a rule; the defaults are those of the released model."""
    slots = sink + slow + fast
    return SlowFastRule(sink, slow, fast, slots, chunk_frames, keep, rope_length, threshold, interval)


RULES = (
    rule(),  # released model
    rule(sink=1, slow=4, fast=4, chunk_frames=2, rope_length=9),
    rule(slow=3, fast=3),  # fast memory of one chunk
    rule(slow=12, keep=3),  # one chunk can be promoted on each of its passes
    rule(rope_length=10),  # positions saturate before the memory is full
    rule(slow=1),  # nothing to roll
    rule(interval=6),  # by frame number
    rule(sink=2, slow=5, fast=6, rope_length=13),  # odd: chunks do not divide the slots
)


def empty_table(rule: SlowFastRule, dim: int) -> SlowFastTable:
    """Return the table of a memory that has seen nothing."""

    def integers(*values):
        return torch.tensor(values, dtype=torch.int32)

    slots, frames = rule.slots, rule.chunk_frames
    return SlowFastTable(
        page_ids=integers(*[0] * slots),
        positions=integers(*[0] * slots),
        sources=integers(*[-1] * slots),
        count=integers(0),
        q_positions=integers(*[0] * frames),
        spare_ids=integers(*range(1, frames + 1)),
        promoted=integers(0),
        seen=integers(0),
        last_key=torch.zeros(dim),
        decision=integers(0, 0, 0, 0, 0),
        similarity=torch.zeros(1),
    )


def passes(rule: SlowFastRule, chunks: int, dim: int, seed: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield (key mean, first frame) of five passes a chunk; about half of the means are new, half a small step away."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(dim, generator=generator)
    for chunk in range(chunks):
        for _ in range(5):
            fresh = torch.rand(1, generator=generator) < 0.5
            step = torch.randn(dim, generator=generator)
            key = step if fresh else key + 0.05 * step
            yield key, chunk * rule.chunk_frames
