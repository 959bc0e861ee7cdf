"""The serve command: a live session in a frame ring, until Ctrl-C."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cfengine.choices import device_type
from cfengine.embed import Format, Memory, Reader
from cfengine.embed.cuda_memory import load_driver
from cfengine.engine import Engine
from cfengine.errors import ConfigError, RingError


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    ring: str
    prompt: str
    model: str
    seconds: float | None
    seed: int
    device: str
    dtype: str | None
    threads: int | None
    format: str
    memory: str = "host"


def run(request: Request) -> int:
    """Serve until the time is over or a signal comes; the exit code."""
    check(request)
    with Engine.from_pretrained(
        request.model, device=request.device, dtype=request.dtype, threads=request.threads, efforts=True
    ) as engine:
        video = engine.config.video
        frames = None if request.seconds is None else max(1, round(request.seconds * video.fps))
        say(
            f"ring {request.ring}: {video.width}x{video.height}, {video.fps} frames/s, {request.format}; Ctrl-C ends it"
        )
        if request.memory == "host":
            say(f"look at it with csrc/client/samples/sdl (docs/hosts.md): build/view/cfengine_view {request.ring}")
        with stopping() as stop:
            done = engine.publish(
                request.prompt,
                request.ring,
                seed=request.seed,
                num_frames=frames,
                stop=stop.is_set,
                say=say,
                format=request.format,
                memory=request.memory,
            )
    say(
        f"{done.frames} frames, {done.late} of {done.chunks} chunks late, {done.reduced} with less effort, "
        f"{done.events} events, {done.refused} refused, {done.failed} failed"
    )
    return 0


def check(request: Request) -> None:
    """Raise ConfigError or RingError for what can be known to be wrong before anything loads."""
    if request.seconds is not None and not math.isfinite(request.seconds):
        raise ConfigError(f"--seconds is {request.seconds}; give a number, or leave it out to go on until Ctrl-C")
    if request.format not in (names := [made.name.lower() for made in Format]):
        raise ConfigError(f"--format is {request.format!r}; choose one of {', '.join(names)}")
    if request.memory not in (names := [made.name.lower() for made in Memory]):
        raise ConfigError(f"--memory is {request.memory!r}; choose one of {', '.join(names)}")
    if request.memory != "host":
        if device_type(request.device) != "cuda":
            raise ConfigError(
                f"--memory {request.memory} is memory of a GPU, and --device is {request.device}; say cuda"
            )
        load_driver()
    try:
        Reader(request.ring).close()
    except RingError as error:
        if error.result == "CF_ERROR_INVALID_ARGUMENT":
            raise RingError(f"--ring is {request.ring!r}: {error}", error.result) from None
        if not error.result:  # the extension is not built
            raise


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM or a closed terminal sets, which is how serving ends; the second of them ends the
    process at once.
    """
    stop, before = threading.Event(), {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is not everywhere, and nohup has it ignored
        number = getattr(signal, name, None)
        if number is not None and (name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN):
            before[number] = signal.getsignal(number)

    def receive(number: int, _frame: object) -> None:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, receive)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Tell the user, on standard error."""
    sys.stderr.write(text + "\n")
