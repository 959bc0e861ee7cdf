"""Inputs of the paper's rule: rules of every size, and passes over chunks, the last of each clean."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .reference import PaperRule


def rule(sink=3, slow=12, fast=6, chunk_frames=3, rope_length=21, threshold=0.95) -> PaperRule:
    """Return a rule; the defaults are the sizes of the released model."""
    return PaperRule(sink, slow, fast, sink + slow + fast, chunk_frames, rope_length, threshold)


RULES = (
    rule(),
    rule(slow=2, rope_length=11),  # slow memory rolls soon
    rule(slow=0),  # nothing is promoted
    rule(sink=0, slow=3),
    rule(sink=4, slow=4, fast=5, rope_length=13),  # the sink takes more than the first chunk
    rule(sink=1, slow=4, fast=4, chunk_frames=2, rope_length=9),
    rule(slow=5, fast=3, chunk_frames=1, rope_length=10),
)


def passes(rule: PaperRule, chunks: int, dim: int, seed: int) -> Iterator[tuple[torch.Tensor, int, bool]]:
    """Yield (key mean, first frame, clean) of three passes a chunk; about half of the clean means are new."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(dim, generator=generator)
    for chunk in range(chunks):
        for noisy in (True, True, False):
            step = torch.randn(dim, generator=generator)
            if noisy:
                yield step, chunk * rule.chunk_frames, False
                continue
            key = step if torch.rand(1, generator=generator) < 0.5 else key + 0.05 * step
            yield key, chunk * rule.chunk_frames, True
