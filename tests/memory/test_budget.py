"""Leases of a budget by themselves: what is free, shared and given back."""

from __future__ import annotations

import dataclasses
import sys
import threading

import pytest
import torch

from cfengine.config import PRESETS, MemoryConfig, PrecisionConfig
from cfengine.errors import CapacityError
from cfengine.memory.budget import Budget, Lease, PageView
from cfengine.memory.pages import session_pages

pytestmark = pytest.mark.cpu

CONFIG = dataclasses.replace(PRESETS["tiny-world"], memory=MemoryConfig(slow=3))
EACH = session_pages(CONFIG.memory)  # pages of a session, a layer


def books(budget: Budget, leases: list[Lease]) -> torch.Tensor:
    """By how many leases each page is held, with the zero page counted as the budget counts it."""
    held = torch.zeros_like(budget.shares)
    held[:, 0] = 1
    for lease in leases:
        for layer, pages in enumerate(lease.pages[:, 1:].tolist()):
            assert len(set(pages)) == EACH
            held[layer, pages] += 1
    return held


def opened(budget: Budget, sessions: int) -> list[Lease]:
    leases = [Lease(budget) for _ in range(sessions)]
    for lease in leases:
        lease.open()
    return leases


def test_sessions_have_pages_of_their_own():
    budget = Budget(CONFIG, torch.float32, sessions=3)
    leases = opened(budget, 3)
    assert torch.equal(books(budget, leases), torch.ones_like(budget.shares))
    with pytest.raises(CapacityError):
        Lease(budget).open()
    leases[1].close()
    leases[1].close()
    assert budget.count().in_use == budget.count().reserved == 2 * 6 * EACH and budget.count().free == 6 * EACH
    other = Lease(budget)
    other.open()
    assert torch.equal(books(budget, [leases[0], other, leases[2]]), torch.ones_like(budget.shares))


def test_of_two_that_share_a_page_the_first_to_write_gets_another():
    budget = Budget(CONFIG, torch.float32, sessions=2)
    one, two = opened(budget, 2)
    two.share(one)
    assert torch.equal(one.pages, two.pages) and budget.count().in_use == 6 * EACH
    before = one.pages.clone()
    ids = torch.tensor([[1, 5, 9]] * 6, dtype=torch.int32)
    two.own(ids)
    two.own(ids)
    one.own(ids)  # alone by now
    assert torch.equal(one.pages, before) and budget.count().in_use == 6 * (EACH + 3)
    changed = (two.pages != one.pages).nonzero()[:, 1].unique().tolist()
    assert changed == [1, 5, 9] and torch.equal(books(budget, [one, two]), budget.shares)
    one.own()
    assert torch.equal(books(budget, [one, two]), torch.ones_like(budget.shares))


def test_layers_part_by_themselves():
    """As many sharers as there are sessions, who write different pages in every layer, until all are apart."""
    budget = Budget(CONFIG, torch.float32, sessions=5)
    leases = opened(budget, 5)
    draw = torch.Generator().manual_seed(3)
    for lease in leases[1:]:
        lease.share(leases[0])
    for turn in range(60):
        ids = torch.stack([torch.randperm(EACH, generator=draw)[:3] + 1 for _ in range(6)])
        leases[turn % 5].own(ids)
        assert torch.equal(books(budget, leases), budget.shares)
        assert (budget.shares.gather(1, leases[turn % 5].pages.gather(1, ids).long()) == 1).all()
    for lease in leases:
        lease.close()
    assert budget.count().in_use == 0 and budget.open == 0


def test_a_session_moves_with_its_pages():
    budget = Budget(CONFIG, torch.float32, sessions=2)
    (one,), other = opened(budget, 1), Lease(budget)
    pages = one.pages.clone()
    other.move(one)
    assert torch.equal(other.pages, pages) and other.held and not one.held and not one.pages.any()
    one.close()
    assert budget.count().in_use == 6 * EACH
    other.close()
    assert budget.count().in_use == 0


def test_a_view_shows_the_pages_of_a_session():
    config = dataclasses.replace(CONFIG, precision=PrecisionConfig(pages="fp8"))
    budget = Budget(config, torch.float32, sessions=2)
    _, two = opened(budget, 2)
    for tensor in budget.pool.tensors().values():
        view = PageView(tensor, two)
        assert view.shape == (6, EACH + 1, *tensor.shape[2:]) and view.dtype == tensor.dtype
        view[4, 7].copy_(torch.full(tensor.shape[2:], 3.0))
        place = int(two.pages[4, 7])
        assert (tensor[4, place].float() == 3).all() and place > EACH
        tensor[:, 0] = tensor[4, place]
    budget.pool.clear_zero()
    assert not any(part[:, 0].float().any() for part in (budget.pool.k, budget.pool.v))
    assert (budget.pool.k_scale[:, 0] == 1).all() and (budget.pool.v_scale[:, 0] == 1).all()
    assert budget.pool.page_bytes * 6 * (2 * EACH + 1) == budget.pool.bytes


def test_threads_share_a_budget():
    """Sessions that run in threads of their own: no page is given to two that both think they are alone with it."""
    budget = Budget(CONFIG, torch.float32, sessions=6)
    root, *leases = opened(budget, 6)
    barrier = threading.Barrier(len(leases))
    holders: list[int] = []  # of pages that a lease has just made its own, the most

    def run(lease: Lease, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        barrier.wait()
        for turn in range(60):
            if turn % 12 == 0:
                lease.share(root)
            ids = torch.stack([torch.randperm(EACH, generator=draw)[:3] + 1 for _ in range(6)])
            lease.own(ids)
            holders.append(int(budget.shares.gather(1, lease.pages.gather(1, ids).long()).max()))
            if turn % 20 == 19:
                lease.close()
                lease.open()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread is put aside between any two of its steps
    threads = [threading.Thread(target=run, args=(lease, seed)) for seed, lease in enumerate(leases)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(holders) == 5 * 60 and set(holders) == {1}
    assert torch.equal(books(budget, [root, *leases]), budget.shares) and budget.open == 6
