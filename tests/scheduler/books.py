"""What the tests of a budget share: a small memory, what a consumer sees, and the books of the pages."""

from __future__ import annotations

import torch

from cfengine.config import MemoryConfig

SMALL = MemoryConfig(slow=3)  # full after four chunks
LAYERS, PAGES = 2, 12 + 3  # of a session: what slots show and what a pass writes, in each of the toy's layers
PAGE = 6 * 48 * 4 * 2  # bytes: tokens, width, float32, keys and values
LANES = ("toy_engine", "device_engine")


def seen(session) -> tuple:
    """What a consumer gets of a chunk, but for the time that it took."""
    frames = session.next_chunk()
    return (
        frames[0].index, frames[0].timings.memory, frames[0].last_event_id,
        b"".join(frame.pixels.tobytes() for frame in frames), session.latents.numpy().tobytes(),
    )  # fmt: skip


def check_books(engine, sessions) -> None:
    """What the budget counts is what open sessions hold; free pages are held by none, and the zero page is zero."""
    budget = engine._lanes._budget
    held = torch.zeros_like(budget.shares)
    held[:, 0] = 1
    for session in sessions:
        lease = session.memory.lease
        for layer, pages in enumerate(lease.pages[:, 1:].tolist()):
            assert len(set(pages)) == len(pages) == PAGES and 0 not in pages
            held[layer, pages] += 1
        spares = session.memory.tables.stacked.spare_ids.long()
        assert (budget.shares.gather(1, lease.pages.gather(1, spares).long()) == 1).all()  # alone may write them
    assert torch.equal(held, budget.shares)
    count = engine.pages
    assert count.reserved == len(sessions) * LAYERS * PAGES and count.in_use <= count.reserved
    assert not any(part[:, 0].float().any() for part in (budget.pool.k, budget.pool.v))
