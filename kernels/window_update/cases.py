"""Inputs of the window rule: rules of every kind, and passes over chunks with flushes and cuts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from .reference import WindowRule


def rule(kind: str, slots: int = 9, sink: int = 3, chunk_frames: int = 3) -> WindowRule:
    """Return the rule of a public code: sf Self-Forcing, ll LongLive, lli its infinity file, ir Infinity-RoPE."""
    sink = 0 if kind == "sf" else sink
    return WindowRule(sink, slots, chunk_frames, kind in ("lli", "ir"), kind == "ll", kind == "ir")


RULES = (
    rule("sf"),
    rule("sf", slots=7),  # chunks do not divide the window
    rule("ll", slots=12),
    rule("ll", slots=8, sink=1, chunk_frames=2),
    rule("ll", slots=10, sink=4),  # the sink takes more than the first chunk
    rule("ll", slots=5),  # a chunk reaches into the sink
    rule("lli"),
    rule("lli", slots=10, sink=4),
    rule("ir", slots=6, sink=1),
    rule("ir", slots=8, sink=1),
)


def passes(rule: WindowRule, chunks: int, seed: int) -> Iterator[tuple[int, bool, bool]]:
    """Yield (first frame, flush before it, cut) of one to three passes a chunk; scenes begin at random where known."""
    chance = random.Random(seed)
    for chunk in range(chunks):
        scene = rule.scenes and chunk > 0 and chance.random() < 0.3
        cut = scene and chance.random() < 0.5
        for i in range(chance.randint(1, 3)):
            yield chunk * rule.chunk_frames, scene and i == 0, cut
