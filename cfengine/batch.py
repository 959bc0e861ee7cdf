"""Sessions that share their passes: they join and leave between two chunks, and one that fails leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cfengine.device import device_errors
from cfengine.errors import CFEngineError
from cfengine.scheduler.lane import Chunk, Lane
from cfengine.session import Session
from cfengine.types import Frame


class Fault(NamedTuple):
    """A session that failed, and is closed, and what it raised."""

    session: Session
    error: Exception


class Batch:
    """Sessions that move in lock-step: products and norms run once over the tokens of all; made by `Engine.batch`.

    Prompts change through the sessions, chunks come from here. Each session sees what it would see alone, but for the
    rounding of larger products. One consumer at a time, as with a session.
    """

    def __init__(
        self,
        lane: Lane,
        join: Callable[..., Session],
        on_close: Callable[[Lane, Batch], None] = lambda lane, batch: None,
    ) -> None:
        """join(prompt, seed, policy, on_close): opens a session in the lane      on_close: has the lane back, once."""
        self.sessions: list[Session] = []  # in the order of joining; a new list with every change
        self._lane, self._join, self._on_close = lane, join, on_close
        self._faults: list[Fault] = []
        self.closed = False

    def join(self, prompt: str, *, seed: int = 0, policy: str | None = None) -> Session:
        """Open a session that takes part from the next chunk on, with its own first chunk.

        policy: another memory rule over the same number of slots
        Raises PromptError, ConfigError, and CapacityError where there is no room; the others are not touched.
        """
        self._check_open()
        session = self._join(prompt, seed, policy, self._left)
        self.sessions = [*self.sessions, session]
        return session

    def leave(self, session: Session) -> None:
        """Close one session and give its pages back, as `session.close()` does; the others go on.

        Raises CFEngineError for a session of somewhere else.
        """
        if session not in self.sessions:
            raise CFEngineError("this session is not one of this batch, or has left it; see Batch.sessions")
        session.close()

    def _left(self, session: Session) -> None:
        """Let a closed session's place go to the one in the last place."""
        if session in self.sessions:
            self.sessions = [other for other in self.sessions if other is not session]
            try:
                self._lane.leave(session._place)
            except RuntimeError:  # the GPU was lost, for all; whoever opens a session next is told
                self._fail()
            for other in self.sessions:
                if other._place == len(self.sessions):
                    other._place = session._place

    def next_chunk(self) -> list[list[Frame]]:
        """Generate one chunk of every session; one list of frames a session, as `Session.next_chunk`.

        What fails in one session alone, such as its decoder, closes that session: its list is empty, `faults` says why,
        and the others go on. What fails in the passes that they share closes all. What is raised of an event changes
        nothing, see `Session.push`.
        """
        self._check_open()
        sessions = self.sessions
        for session in sessions:
            session._director.edge()
        if not sessions:
            return []
        moving = sorted(sessions, key=lambda session: session._place)
        keys = sessions[0].memory.pool.k
        try:
            with device_errors(sessions[0].config, keys.device, keys.element_size()):
                chunks = self._lane.run([session._step() for session in moving])
        except BaseException:
            self._fail()
            raise
        made = {session: self._accepted(session, chunk) for session, chunk in zip(moving, chunks, strict=True)}
        return [made[session] for session in sessions]

    def _accepted(self, session: Session, chunk: Chunk | Exception) -> list[Frame]:
        """Frames of a session; none where it failed."""
        try:
            return session._accept(chunk)
        except Exception as error:
            self._faults.append(Fault(session, error))
            session.close()
            return []

    def faults(self) -> list[Fault]:
        """Sessions that failed since this was last asked."""
        faults, self._faults = self._faults, []
        return faults

    def _check_open(self) -> None:
        if self.closed:
            raise CFEngineError("this batch is closed; open a new one with Engine.batch(...)")

    def _fail(self) -> None:
        """Close every session, and for good the lane, which is half a chunk ahead, or whose GPU is lost."""
        self._lane.close()
        self.close()

    def close(self) -> None:
        """Close every session; harmless twice."""
        sessions, self.sessions = self.sessions, []
        for session in sessions:
            session.close()
        if not self.closed:
            self.closed, lane, self._lane, self._join = True, self._lane, None, None
            self._on_close(lane, self)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
