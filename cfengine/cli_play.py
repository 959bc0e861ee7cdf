"""The play command: a window on a live video, steered with the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cfengine.config import has_display
from cfengine.engine import Engine
from cfengine.errors import CFEngineError, ConfigError, OutputError
from cfengine.events import Event, Prompt, Reset
from cfengine.playout import Playout, Shown
from cfengine.steering import steered

if TYPE_CHECKING:
    from cfengine.session import Session
    from cfengine.snapshot import Snapshot

SMALL, SMALL_SCALE = 128, 8  # pictures up to this width are shown larger
REFRESH = 60  # looks at keys and clock a second, where the display does not wait for its own
NO_DISPLAY = (
    "there is no display to open a window on; set DISPLAY, or try: xvfb-run cfengine play ... (a display in memory), "
    "cfengine generate ... (a file), cfengine serve --ring NAME (frames for another program)"
)


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    prompt: str
    model: str
    seed: int
    scale: int | None
    device: str
    dtype: str | None
    threads: int | None
    frames: int | None
    screenshot: Path | None
    press: tuple[str, ...]


class Key(NamedTuple):
    """A key or a character that was typed; `name` as pygame calls keys."""

    name: str
    text: str = ""


def library() -> ModuleType:
    """pygame, or ConfigError with the way to get it."""
    try:
        with redirect_stdout(None):  # it greets
            import pygame
    except ImportError:
        raise ConfigError("cfengine play needs pygame: pip install 'cfengine[play]'") from None
    return pygame


@contextmanager
def window(width: int, height: int) -> Iterator[tuple[ModuleType, object]]:
    """pygame and a surface to draw on; ConfigError where no display is."""
    pygame = library()
    if not has_display():
        raise ConfigError(NO_DISPLAY)
    try:
        pygame.display.init()
        surface = pygame.display.set_mode((width, height), pygame.RESIZABLE)
    except pygame.error as error:
        raise ConfigError(f"{NO_DISPLAY} (SDL says: {error})") from None
    try:
        yield pygame, surface
    finally:
        pygame.display.quit()


Moment = tuple[str, "Snapshot"]  # what was asked for last, and all that the session was


class Player:
    """A session, its playout, and what keys make of them."""

    def __init__(self, session: Session) -> None:
        self.session, self.seed = session, session.seed
        self.prompt = self.first = session.prompt
        self.asked = 0  # number of the event that asked for the prompt
        self.efforts = session.efforts  # which a closed session no longer tells
        self.kept: Moment | None = None
        self.typed: str | None = None  # the line that is being typed
        self.paused = self.over = False
        self.said = ""
        self.latency = 0.0  # seconds from the last key to its first frame
        self.playout = self._play()

    def _play(self) -> Playout:
        return Playout(self.session, fps=self.session.config.video.fps).__enter__()

    def press(self, key: Key) -> None:
        """Do what a key says."""
        if self.typed is not None:
            self._type(key)
        elif key.name in ("left", "right", "down"):
            self.show(steered(self.prompt, {"left": -1, "right": 1, "down": 0}[key.name]))
        elif key.name == "tab":
            self.typed = ""
        elif key.name == "space":
            self.paused = not self.paused
            if not self.paused:
                self.playout.resume()
        elif key.name == "s":
            self._stopped(self._keep)
        elif key.name == "b" and self.kept:
            self._stopped(lambda: self._go_to(self.kept))
        elif key.name in ("r", "n"):
            self.seed = (self.seed + (key.name == "n")) % 2**64
            self.show(self.first)
            self._tell(Reset(self.seed))
        elif key.name == "escape":
            self.over = True

    def _type(self, key: Key) -> None:
        if key.name == "return" and self.typed:
            self.show(self.typed)
        if key.name in ("return", "escape"):
            self.typed = None
        elif key.name == "backspace":
            self.typed = self.typed[:-1]
        else:
            self.typed += key.text

    def show(self, prompt: str) -> None:
        """Change the prompt."""
        if number := self._tell(Prompt(prompt)):
            self.prompt, self.asked = prompt, number

    def _tell(self, event: Event) -> int:
        """Push an event; its number, or 0 where something is wrong with it, which the title says."""
        try:
            number, self.said = self.session.push(event), ""
        except CFEngineError as error:
            number, self.said = 0, str(error)
        return number

    def _stopped(self, work) -> None:
        """Do something with the session that its playout must not run beside."""
        untold = self.playout.close()
        for error in untold:
            self._failed(error)
        work()
        self.said = "; ".join([*map(str, untold), self.said])
        self.playout = self._play()

    def _keep(self) -> None:
        self.kept, self.said = (self.prompt, self.session.snapshot()), "kept; b goes back here"

    def _go_to(self, moment: Moment) -> None:
        (self.prompt, snapshot), self.asked = moment, 0
        self.session.rewind(snapshot)
        self.seed, self.said = self.session.seed, "back"

    def look(self) -> Shown | None:
        """The frame of now; None while paused, before the first, or when an event failed, which the title says."""
        if self.paused:
            return None
        try:
            shown = self.playout.at()
        except CFEngineError as error:
            self._failed(error)
            return None
        for receipt in shown.frame.timings.events if shown else ():
            self.latency = receipt.latency
        return shown

    def _failed(self, error: BaseException) -> None:
        """Say what became of an event; any other error is raised."""
        if getattr(error, "event_id", None) is None:
            raise error
        self.said = str(error)
        with suppress(CFEngineError):  # one that closed the session since: the next look says it
            if error.event_id >= self.asked:  # no later prompt is on its way
                self.prompt = self.session.prompt

    @property
    def title(self) -> str:
        if self.typed is not None:
            return f"prompt: {self.typed}_"
        stats = self.playout.stats()
        state = "paused" if self.paused else f"key to frame {1e3 * self.latency:.0f} ms, {stats.missed} missed"
        if stats.level:
            state += f", effort {100 * self.efforts[stats.level]:.0f} %"
        return f"{self.prompt}  ({state})  {self.said}"

    def close(self) -> None:
        self.playout.close()


def scripted(press: tuple[str, ...]) -> dict[int, list[str]]:
    """Keys by the frame at which they are pressed, of "FRAME:KEY"."""
    keys: dict[int, list[str]] = {}
    for text in press:
        frame, _, key = text.partition(":")
        if not frame.isdecimal() or int(frame) < 1 or not key:
            raise ConfigError(f"--press is {text!r}; give FRAME:KEY with a frame from 1 on, such as 24:left")
        keys.setdefault(int(frame), []).append(key)
    return keys


def run(request: Request) -> int:
    """Play until Esc, a closed window, or enough frames; the exit code."""
    keys = scripted(request.press)
    library()
    with Engine.from_pretrained(
        request.model, device=request.device, dtype=request.dtype, threads=request.threads, efforts=True
    ) as engine:
        video = engine.config.video
        scale = request.scale or (SMALL_SCALE if video.width <= SMALL else 1)
        size = video.width * scale, video.height * scale
        with window(*size) as (pygame, surface), engine.session(request.prompt, seed=request.seed) as session:
            player = Player(session)
            try:
                loop(pygame, surface, player, keys, request.frames)
                if request.screenshot:
                    save(pygame, surface, request.screenshot)
            finally:
                player.close()
    return 0


def save(pygame: ModuleType, surface, path: Path) -> None:
    """Write the window as a picture; OutputError where that cannot be."""
    try:
        pygame.image.save(surface, str(path))
    except (pygame.error, OSError) as error:
        raise OutputError(f"--screenshot {path} cannot be written ({error}); choose another place") from None


def loop(pygame: ModuleType, surface, player: Player, keys: dict[int, list[str]], frames: int | None) -> None:
    """Keys in, frames out, REFRESH times a second."""
    clock, last, seen = pygame.time.Clock(), None, 0
    while not player.over and (frames is None or seen < frames):
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                player.over = True
            elif event.type == pygame.KEYDOWN:
                player.press(Key(pygame.key.name(event.key), event.unicode if event.unicode.isprintable() else ""))
        shown = player.look()
        if shown is not None and shown.frame is not last:
            last, seen = shown.frame, seen + 1
            draw(pygame, surface, last.pixels)
            for name in keys.pop(seen, ()):
                player.press(Key(name))
        pygame.display.set_caption(player.title)
        clock.tick(REFRESH)


def draw(pygame: ModuleType, surface, pixels: np.ndarray) -> None:
    """Fill the window with a frame (H, W, 3), as large as its shape allows; pixels stay sharp."""
    height, width = pixels.shape[:2]
    room = surface.get_size()
    scale = min(room[0] / width, room[1] / height)
    size = round(width * scale), round(height * scale)
    picture = pygame.surfarray.make_surface(pixels.swapaxes(0, 1))
    surface.fill((0, 0, 0))
    surface.blit(pygame.transform.scale(picture, size), ((room[0] - size[0]) // 2, (room[1] - size[1]) // 2))
    pygame.display.flip()
