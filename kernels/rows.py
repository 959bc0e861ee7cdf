"""A layer's page table as lists, for rules written in Python."""

from __future__ import annotations

import torch

NONE, FILL, ROLL = 0, 1, 2  # what a promotion did, `SlowFastTable.decision[3]`


class Row:
    """The entries that a rule permutes; `write` puts them back, with the pages that no slot shows any more."""

    def __init__(self, table) -> None:
        self.table = table
        self.ids: list[int] = table.page_ids.tolist()
        self.sources: list[int] = table.sources.tolist()
        self.spare: list[int] = table.spare_ids.tolist()
        self.end, self.seen = int(table.count), int(table.seen)

    def write(self, positions: list[int], q_positions: list[int], *, action: int = NONE, shifted: bool = False) -> None:
        frames, slots = len(self.spare), len(self.ids)
        used = set(self.ids)
        self.spare = [page for page in range(1, slots + frames + 1) if page not in used][:frames]
        pairs = (
            (self.table.page_ids, self.ids),
            (self.table.positions, positions + [0] * (slots - len(positions))),
            (self.table.sources, self.sources),
            (self.table.count, [self.end]),
            (self.table.q_positions, q_positions),
            (self.table.spare_ids, self.spare),
            (self.table.seen, [self.seen]),
            (self.table.decision, [0, 0, 0, action, int(shifted)]),
        )
        for tensor, values in pairs:
            tensor.copy_(torch.tensor(values, dtype=torch.int32))
