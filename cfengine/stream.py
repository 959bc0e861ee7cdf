"""Frames of a session that nobody else has."""

from __future__ import annotations

from collections.abc import Iterator

from cfengine.session import Session
from cfengine.types import Frame


class Stream(Iterator[Frame]):
    """Frames as chunks are decoded; made by `Engine.stream`, which says which.

    The session closes after the last frame, with an error, and at `close`. Dropped, a stream gives back what it holds
    when the next session opens, and on a CPU without `max_sessions` at once. It has no finaliser: the garbage collector
    may run in the middle of any call, of another thread too, whose locks a session on its way out would wait for.
    """

    def __init__(self, session: Session, num_frames: int | None) -> None:
        self._session, self._frames = session, session.frames(num_frames)

    def __next__(self) -> Frame:
        try:
            return next(self._frames)
        except BaseException:  # StopIteration among them
            self.close()
            raise

    def close(self) -> None:
        """Stop the work and give the memory back; harmless twice."""
        self._frames.close()
        self._session.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
