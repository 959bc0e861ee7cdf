"""Several sessions as one: their tokens lie one behind the other, and only attention tells them apart."""

from __future__ import annotations

import torch
from torch import Tensor

from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass
from cfengine.ops import Ops


class MemoryBatch:
    """Memories of sessions in lock-step, as one memory to a pass.

    A pass's start_frame and cut hold one entry a session.
    """

    def __init__(self, memories: list[Memory]) -> None:
        self.memories = memories

    @property
    def device(self) -> torch.device:
        return self.memories[0].device

    def attend(
        self, layer: int, q: Tensor | None, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor], step: Pass
    ) -> Tensor | None:
        """See `Memory.attend`; q, k, v: (sessions * tokens, dim)."""
        count = len(self.memories)
        queries = [None] * count if q is None else q.chunk(count)
        parts = [
            memory.attend(layer, *own, norms, step._replace(start_frame=step.start_frame[i], cut=step.cut[i]))
            for i, (memory, *own) in enumerate(zip(self.memories, queries, k.chunk(count), v.chunk(count), strict=True))
        ]
        return None if q is None else torch.cat(parts)

    def end_pass(self) -> None:
        """See `Memory.end_pass`."""
        for memory in self.memories:
            memory.end_pass()


def per_session(ops: Ops):
    """`ops.cross_attention` over the tokens of one session, or of several, each against the keys of its own prompt.

    -> cross_attention(q, k, v, bias), or cross_attention(q, *caches) with one (k, v, bias) a session
    """
    attention = ops.cross_attention

    def cross_attention(q: Tensor, *caches) -> Tensor:
        if torch.is_tensor(caches[0]):
            return attention(q, *caches)
        parts = zip(q.chunk(len(caches)), caches, strict=True)
        return torch.cat([attention(part, *cache) for part, cache in parts])

    return cross_attention


def joined(memories: list[Memory], starts, cuts, prompts):
    """(memory, start_frame, cut, cross) of a pass over one session, or over several as one.

    memories, starts, cuts, prompts: one entry a session
    """
    if len(memories) == 1:
        return memories[0], starts[0], cuts[0], prompts[0]
    return MemoryBatch(memories), starts, cuts, [tuple(caches) for caches in zip(*prompts, strict=True)]
