"""What the generate command shows while it runs: a live bar on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cfengine.cli_generate import Tally

INTERVAL = 5.0  # seconds between plain progress lines


class PlainDisplay:
    """Lines on standard error, at most one every INTERVAL seconds; results on standard output."""

    def __init__(self) -> None:
        self._spoken = time.monotonic()

    def loading(self, model: str) -> None:
        self._say(f"loading {model}")

    def preparing(self, what: str, done: int, total: int) -> None:
        """A step of what a backend makes on first use: an export, a calibration, plans."""
        if time.monotonic() - self._spoken >= INTERVAL:
            self._say(f"{done}/{total} {what}")

    def begin(self, tally: Tally) -> None:
        self._spoken = time.monotonic()

    def update(self, tally: Tally, new_chunk: bool) -> None:
        if time.monotonic() - self._spoken >= INTERVAL:
            self._say(f"{tally.frames}/{tally.wanted} frames, {tally.now}")

    def done(self, message: str) -> None:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()

    def stopped(self, message: str) -> None:
        self._say(message)

    def failed(self, message: str) -> None:
        self._say(f"error: {message}")

    def notice(self, message: str) -> None:
        self._say(f"notice: {message}")

    def close(self) -> None:
        """Leave the terminal as it was found."""

    def _say(self, message: str) -> None:
        self._spoken = time.monotonic()
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


class LiveDisplay(PlainDisplay):
    """A bar on standard error that moves with every chunk and keeps its clock running between them."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)

    def loading(self, model: str) -> None:
        self._progress.update(self._task, description=f"loading {model}")
        self._progress.start()

    def preparing(self, what: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=what, completed=done, total=total)

    def begin(self, tally: Tally) -> None:
        self._progress.reset(self._task, total=tally.wanted, description="first chunk")

    def update(self, tally: Tally, new_chunk: bool) -> None:
        changes = {"description": tally.now} if new_chunk else {}
        self._progress.update(self._task, completed=tally.frames, **changes)

    def done(self, message: str) -> None:
        self.close()
        super().done(message)

    def stopped(self, message: str) -> None:
        self.close()
        self._console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def failed(self, message: str) -> None:
        self.close()
        self._console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)

    def notice(self, message: str) -> None:
        self._console.print(f"notice: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


@contextmanager
def display() -> Iterator[PlainDisplay]:
    """Give the display that suits standard error, show notices through it, and close it whatever happens."""
    show = LiveDisplay() if sys.stderr.isatty() else PlainDisplay()
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def showwarning(message, category, *place, **more) -> None:
            if issubclass(category, UserWarning):  # such as a word of the prompt that the model does not know
                show.notice(str(message))
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = showwarning
        try:
            yield show
        finally:
            show.close()
