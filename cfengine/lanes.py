"""What the sessions of an engine run on: opened, taken back, and kept where making it anew takes time or memory."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from cfengine.choices import used_operations
from cfengine.codec import Codec
from cfengine.config import EngineConfig
from cfengine.device import check_fits, device_errors, page_bytes
from cfengine.errors import CapacityError, ConfigError, DeviceError
from cfengine.memory.budget import Budget, PageCount
from cfengine.memory.kept import KeptLatents
from cfengine.memory.memory import Memory
from cfengine.ops import Ops
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.device_lane import DeviceLane
from cfengine.scheduler.graphs import CudaRuntime, check_captured
from cfengine.scheduler.idle import IdleLanes
from cfengine.scheduler.lane import HostLane, Lane


class Seat(NamedTuple):
    """What a budget holds ready for a session on a CPU, beside its pages."""

    memory: Memory
    kept: KeptLatents


class Lanes:
    """Lanes of one engine: a lane for each session that is alone, one for each batch.

    With `max_sessions`, pages for so many are allocated here, with their tables and kept latents, or on a GPU so many
    lanes with their graphs; sessions under another rule than the engine's have the pages alone. Without, what a session
    needs is allocated when it opens. On a GPU a lane that took seconds to capture is kept for the next session.
    """

    def __init__(
        self, config: EngineConfig, ops: Ops, scheduler: ChunkScheduler, codec: Codec, dtype: torch.dtype,
        device: torch.device | str, runtime: CudaRuntime | None, max_sessions: int | None,
    ) -> None:  # fmt: skip
        self._config, self._ops, self._scheduler, self.codec = config, ops, scheduler, codec
        self._dtype, self._device, self._runtime = dtype, device, runtime
        self._max, self._lock = max_sessions, threading.RLock()  # sessions may be opened in several threads
        self.idle = IdleLanes(max_sessions or 1)
        # lanes in use, and who uses them: one worth keeping is taken back from who is dropped, another goes with him
        goes = max_sessions is None and runtime is None
        self._lent: MutableMapping[Lane, weakref.ref] = weakref.WeakKeyDictionary() if goes else {}
        self._seats: list[Seat] = []
        self._budget: Budget | None = None
        if max_sessions is not None:
            self._reserve(max_sessions)

    def _reserve(self, sessions: int) -> None:
        """Allocate all that can be known of so many sessions."""
        with self._making(f"the memory of {sessions} session(s)", sessions):
            self._budget = Budget(self._config, self._dtype, self._device, sessions)
        if self._runtime is None:
            self._seats = [self._seat(self._config) for _ in range(sessions)]
            return
        for _ in range(sessions):
            self.idle.keep(self._device_lane(self._config, 1))

    def _making(self, what: str, sessions: int) -> AbstractContextManager:
        """Where the parts of `sessions` new sessions are allocated.  Raises DeviceError where they do not fit."""
        size = self._dtype.itemsize
        if self._runtime is not None:
            check_fits(what, sessions * page_bytes(self._config, size), self._config, self._device, size)
        return device_errors(self._config, self._device, size)

    def _queue(self) -> AbstractContextManager:
        return self._runtime.on(self._runtime.compute) if self._runtime else nullcontext()

    def pages(self) -> PageCount | None:
        """Pages of the budget, if there is one."""
        with self._lock, self._queue():
            self._take_back()
            return None if self._budget is None else self._budget.count()

    def alone(self, seed: int, config: EngineConfig) -> Lane:
        """A lane with one session.  Raises CapacityError, DeviceError."""
        with self._lock:
            self._check_room()
            if self._runtime is None:
                lane = HostLane(self._scheduler, config)
                self.join(lane, config)
                return lane
            lane = self._device_lane_for(config, 1)
            try:
                lane.join()
            except BaseException:
                self.idle.keep(lane)
                raise
        lane.expect([seed])
        return lane

    def shared(self, sessions: int) -> Lane:
        """A lane for a batch that begins with so many sessions, none of which has joined it yet."""
        if self._runtime is None:
            return HostLane(self._scheduler, self._config)
        with self._lock:
            return self._device_lane_for(self._config, max(self._max or sessions, 1))

    def join(self, lane: Lane, config: EngineConfig) -> int:
        """Room for a session in a lane; its place.  Raises CapacityError, and ConfigError where its rule cannot be."""
        if isinstance(lane, HostLane):
            with self._lock, self._making("a session", 1):
                self._check_room()
                seat = self._free_seat(config)
                return lane.join(seat.memory, seat.kept, self.codec.decoder())
        if config.memory != self._config.memory:
            raise ConfigError(
                f"policy {config.memory.policy!r} cannot join a batch of policy {self._config.memory.policy!r} on a "
                "GPU, whose graphs hold the rule; open it with Engine.session(..., policy=...)"
            )
        with self._lock:
            self._check_room()
            return lane.join()

    def _check_room(self) -> None:
        if self._budget is None:
            return
        try:
            self._budget.check()
        except CapacityError:
            gc.collect()  # a batch and its sessions hold one another
            self._take_back()
            self._budget.check()

    def _take_back(self) -> None:
        """Have back the lanes of who was dropped without being closed."""
        for lane in [lane for lane, user in self._lent.items() if user() is None]:
            self.keep(lane)

    def _free_seat(self, config: EngineConfig) -> Seat:
        free = (seat for seat in self._seats if not seat.memory.taken)
        seat = next(free, None) if config.memory == self._config.memory else None
        return seat or self._seat(config)

    def _seat(self, config: EngineConfig) -> Seat:
        memory = Memory(config, self._ops, self._dtype, self._device, self._budget)
        return Seat(memory, KeptLatents(config, memory.device))

    def _device_lane_for(self, config: EngineConfig, room: int) -> DeviceLane:
        """One that was left, or a new one, which idle ones make room for unless they are the budget's."""
        self._take_back()
        lane = self.idle.take((config.memory, room))
        if lane is None:  # one that nobody closed saves a capture
            gc.collect()
            self._take_back()
            lane = self.idle.take((config.memory, room))
        if lane is not None:
            return lane
        try:
            return self._device_lane(config, room)
        except DeviceError:
            if self._budget is not None or not self.idle.drop():
                raise
        return self._device_lane(config, room)

    def _device_lane(self, config: EngineConfig, room: int) -> DeviceLane:
        """A lane with room for so many sessions, all its graphs captured."""
        budget, runtime = self._budget, self._runtime
        new = 0 if budget else room
        with self._making(f"the memory of {new} new session(s)", new), self._queue():
            if budget is None and room > 1:  # sessions that change places do not move their pages
                budget = Budget(config, self._dtype, self._device, room)
            memories = [Memory(config, self._ops, self._dtype, self._device, budget) for _ in range(room)]
            decoders = [self.codec.decoder() for _ in range(room)]
            if runtime.graphs:
                check_captured(self._ops, used_operations(memories[0].policy.op))
            return DeviceLane(self._scheduler, config, memories, decoders, runtime)

    def lend(self, lane: Lane, user: object) -> None:
        """Remember who uses a lane."""
        with self._lock:
            self._take_back()
            self._lent[lane] = weakref.ref(user)

    def users(self) -> list:
        """Who has lanes: sessions and batches that are open."""
        with self._lock:
            return [user for user in (found() for found in self._lent.values()) if user is not None]

    def keep(self, lane: Lane, user: object = None) -> None:
        """Take back the lane of closed sessions, to be used again if that saves time; harmless twice.

        user: who had it; None: it was lent to nobody. One whom the garbage collector finds counts as dropped before
        what it holds is closed, so that its lane may be somebody else's by then.
        """
        with self._lock:
            known = self._lent.get(lane)
            if user is not None and (known is None or known() not in (None, user)):
                return
            self._lent.pop(lane, None)
            if isinstance(lane, DeviceLane):
                self.idle.keep(lane)
            else:
                lane.close()  # nothing in it took time to make

    def drop(self) -> None:
        """Let go of all that is kept, pages and weights included; nothing can be opened afterwards."""
        with self._lock:
            lent, self._lent = list(self._lent), {}
        for lane in lent:  # of who was dropped without being closed
            lane.close()
        self.idle.drop()
        self._seats, self._budget, self._scheduler, self.codec, self._runtime = [], None, None, None, None
