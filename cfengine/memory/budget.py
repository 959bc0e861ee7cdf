"""One pool of pages for all sessions of an engine: who is let in, who shows which page, and who may write it."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.errors import CapacityError
from cfengine.memory.pages import PagePool, session_pages


class PageCount(NamedTuple):
    """Pages of an engine; a page is one latent frame in one layer.

    total: of the budget      reserved: what open sessions may come to need      in_use: held now, shared ones once
    """

    total: int
    reserved: int
    in_use: int
    page_bytes: int  # of one page, scales included

    @property
    def free(self) -> int:
        """What sessions to come may reserve."""
        return self.total - self.reserved

    @property
    def bytes(self) -> int:
        """Size of the budget."""
        return self.total * self.page_bytes


class Budget:
    """A fixed number of pages, enough for `sessions` sessions, allocated here and never again.

    A session is let in where the most that it can ever need is free, so none fails later for want of a page. What it
    holds may be less: a branch shows the pages of the session it came from, and gets one of its own for each that it
    writes (`Lease.own`). Since every holder has reserved pages for itself, there is always a free one for that.

    shares: (layers, pages) int32, by how many sessions a page is held; 0 is free. It lives where the pages are and is
    changed by work queued in order with the passes, so that a captured graph changes it too, and no host waits for it.
    lock: held by a thread that queues such work, where sessions run in several threads
    """

    def __init__(
        self, config: EngineConfig, dtype: torch.dtype, device: torch.device | str = "cpu", sessions: int = 1
    ) -> None:
        self.pool = PagePool(config, dtype, device, sessions)
        self.sessions, self.open = sessions, 0
        self.lock = threading.RLock()
        self.each = session_pages(config.memory)  # pages of a session, a layer
        layers, pages = self.pool.k.shape[:2]
        self.shares = torch.zeros(layers, pages, dtype=torch.int32, device=device)
        self.shares[:, 0] = 1  # the zero page is nobody's

    @property
    def session_bytes(self) -> int:
        """What a session reserves."""
        return self.shares.shape[0] * self.each * self.pool.page_bytes

    def count(self) -> PageCount:
        """Pages by what they are for; waits for what is queued."""
        pages = self.shares.shape[0] * self.each
        held = int((self.shares[:, 1:] > 0).sum())
        return PageCount(self.sessions * pages, self.open * pages, held, self.pool.page_bytes)

    def check(self) -> None:
        """Raise CapacityError unless pages for another session can be set aside."""
        if self.open == self.sessions:
            needed, budget = self.session_bytes, self.sessions * self.session_bytes
            raise CapacityError(
                f"a session needs {needed} bytes of pages and 0 of {budget} are free: {self.open} of {self.sessions} "
                f"sessions are open; close one, or load the engine with max_sessions={self.sessions + 1} or more",
                needed=needed,
                free=0,
                budget=budget,
            )

    def found(self, wanted: Tensor) -> Tensor:
        """The free pages of each layer by their number, 1, 2, ...: wanted (layers, n) int64 -> (layers, n) int64."""
        return torch.searchsorted((self.shares == 0).cumsum(1), wanted)


class Lease:
    """The pages of one session in a budget.

    A session's tables and rules count its own pages, 1 to `Budget.each`, whoever else is there; pages[layer, id] is
    where in the pool such a page lies. All are 0 while no session holds it: passes then write the zero page, which is
    made zero again after that (a graph is captured so).
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        layers = budget.shares.shape[0]
        self.pages = torch.zeros(layers, budget.each + 1, dtype=torch.int32, device=budget.shares.device)
        self.held = False

    @torch.inference_mode()
    def open(self) -> None:
        """Take pages for a new session.  Raises CapacityError where there are none, with nothing changed."""
        with self.budget.lock:
            self.budget.check()
            layers, each = self.budget.shares.shape[0], self.budget.each
            wanted = torch.arange(1, each + 1, device=self.pages.device).expand(layers, each).contiguous()
            self.pages[:, 1:] = self.budget.found(wanted)
            self._count(1)
            self.budget.open += 1
            self.held = True

    @torch.inference_mode()
    def close(self) -> None:
        """Give all of them back; harmless twice."""
        with self.budget.lock:
            if self.held:
                self._count(-1)
                self.pages.zero_()
                self.budget.open -= 1
                self.held = False

    def shares_with(self, pages: Tensor | PageView | None) -> bool:
        """Whether pages lie in the same budget."""
        return isinstance(pages, PageView) and pages.lease.budget is self.budget

    @torch.inference_mode()
    def share(self, other: Lease) -> None:
        """Hold the pages of another session in place of one's own; nothing is copied."""
        with self.budget.lock:
            self._count(-1)
            self.pages.copy_(other.pages)
            self._count(1)

    def move(self, other: Lease) -> None:
        """Take over what another lease holds, which then holds nothing."""
        with self.budget.lock:
            self.pages.copy_(other.pages)
            self.held, other.held = other.held, False
            other.pages.zero_()

    def _count(self, by: int) -> None:
        pages = self.pages[:, 1:].long()
        self.budget.shares.scatter_add_(1, pages, torch.full_like(pages, by, dtype=torch.int32))

    @torch.inference_mode()
    def own(self, ids: Tensor | None = None) -> None:
        """See to it that pages are this session's alone, before it writes all of them: nothing is copied.

        ids: (layers, n) integers, each once a layer; None for all      Fixed shapes, and no word to the host.
        """
        with self.budget.lock:
            shares = self.budget.shares
            if ids is None:
                ids = torch.arange(1, self.pages.shape[1], device=shares.device).expand(len(shares), -1)
            ids = ids.long()
            held = self.pages.gather(1, ids).long()
            shared = shares.gather(1, held) > 1
            own = torch.where(shared, self.budget.found(shared.cumsum(1)), held)
            shares.scatter_add_(1, held, -shared.int())
            shares.scatter_add_(1, own, shared.int())
            self.pages.scatter_(1, ids, own.int())


class PageView:
    """Pages of a lease as a tensor of their own would be: (layers, ids, ...), read and written page by page."""

    def __init__(self, pages: Tensor, lease: Lease) -> None:
        self._pages, self.lease = pages, lease
        self._places = lease.pages.tolist()
        layers, ids = lease.pages.shape
        self.shape, self.dtype, self.device = torch.Size((layers, ids, *pages.shape[2:])), pages.dtype, pages.device
        self.is_cuda = pages.is_cuda

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        """place: (layer, id)"""
        layer, page = place
        return self._pages[layer, self._places[layer][page]]
