"""The window of `cfengine play`, on SDL's driver without a display."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cfengine import Engine
from cfengine.cli import app
from cfengine.cli_play import Key, Player, scripted
from cfengine.errors import ConfigError, PromptError
from cfengine.playout import PlayoutStats
from cfengine.types import Frame

pytestmark = pytest.mark.cpu


def test_a_window_shows_the_stream(tmp_path, monkeypatch) -> None:
    """The window at the end holds one of the session's frames, each pixel three times both ways."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    out = tmp_path / "window.png"
    given = ["play", "pan right, meadow", "--seed", "5", "--threads", "1", "--scale", "3", "--frames", "14"]
    result = CliRunner().invoke(app, [*given, "--screenshot", str(out)])
    assert result.exit_code == 0, result.output
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape == (3 * 64, 3 * 96, 3)
    with Engine.from_pretrained("tiny-world", threads=1) as engine, engine.session("pan right, meadow", seed=5) as one:
        frames = [*one.next_chunk(), *one.next_chunk()]
        here = one.snapshot()
        for level in (0, 1):  # the third chunk has less effort where the first two were late
            one.rewind(here)
            one.effort = level
            frames += one.next_chunk()
    shown = [np.array_equal(picture, frame.pixels.repeat(3, 0).repeat(3, 1)) for frame in frames]
    assert any(shown[13:])


def until_cut(player: Player, last: Frame | None) -> Frame:
    """The first frame after a new beginning, another than the last one."""
    end = time.monotonic() + 120
    while (shown := player.look()) is None or not shown.frame.cut or shown.frame is last:
        assert time.monotonic() < end
        time.sleep(0.01)
    return shown.frame


def test_keys_steer_type_keep_and_go_back() -> None:
    with Engine.from_pretrained("tiny-world", threads=1) as engine, engine.session("pan right, meadow") as session:
        player = Player(session)
        try:
            player.press(Key("left"))
            assert player.prompt == "pan left, meadow"
            for key in (Key("tab"), *(Key("x", letter) for letter in "snow, hold!"), Key("backspace"), Key("left")):
                player.press(key)
            assert player.title == "prompt: snow, hold_"
            player.press(Key("return"))
            assert player.prompt == "snow, hold" and player.typed is None
            player.press(Key("s"))
            player.press(Key("right"))
            assert player.prompt == "pan right, snow"
            player.press(Key("b"))
            assert player.prompt == "snow, hold"
            before = None
            for name, seed in (("r", 0), ("n", 1)):
                player.press(Key(name))
                assert player.prompt == "pan right, meadow" and player.seed == seed
                shown = until_cut(player, before)
                assert session.prompt == "pan right, meadow"
                assert before is None or not np.array_equal(shown.pixels, before.pixels)
                before = shown
            for key in (Key("tab"), *(Key("x", letter) for letter in "zzz"), Key("return")):
                player.press(key)
            assert "no word of the prompt" in player.said and not session.closed
            player.press(Key("space"))
            assert player.look() is None and "paused" in player.title
            player.press(Key("escape"))
            assert player.over
        finally:
            player.close()


def test_an_event_that_fails_is_said_and_the_stream_goes_on(toy_engine) -> None:
    """Only this encoder finds that thirteen words are too many, beside the chunks."""
    with toy_engine().session("a") as session:
        player = Player(session)
        try:
            playing = player.playout
            player.show("b " * 13)
            assert player.prompt == "b " * 13 and not player.said
            end = time.monotonic() + 120
            while not player.said:
                player.look()
                assert time.monotonic() < end
            assert "is dropped, the stream goes on" in player.said and player.prompt == "a"
            player.show("c")
            while (shown := player.look()) is None or shown.frame.last_event_id != 2:
                assert time.monotonic() < end
            assert player.playout is playing and player.prompt == "c" and not player.said
        finally:
            player.close()


class Told:
    """A playout that has nothing to tell but that event 1 failed."""

    def __init__(self) -> None:
        self.error = PromptError("event 1 is dropped")
        self.error.event_id = 1

    def at(self) -> None:
        raise self.error

    def close(self) -> list[BaseException]:
        return [self.error]

    def stats(self) -> PlayoutStats:
        return PlayoutStats(shown=9, missed=0, dropped=0, stalled=0.0, ready=0, level=1)


def test_a_prompt_that_was_asked_for_since_stays(toy_engine) -> None:
    with toy_engine().session("a") as session:
        player = Player(session)
        player.close()
        player.show("b " * 13)
        player.show("c")
        player.playout = Told()
        assert player.look() is None and player.said == "event 1 is dropped" and player.prompt == "c"


def test_the_title_of_a_session_that_failed_hides_no_error(toy_engine) -> None:
    """Its last frames are still shown, with less effort, before the display is told why it closed."""
    with toy_engine().session("a") as session:
        player = Player(session)
        player.close()
    player.playout = Told()
    assert "effort 80 %" in player.title


def test_what_failed_is_said_where_the_playout_stops(toy_engine) -> None:
    """The error waits behind frames that are not due yet; the moment that is kept has the prompt that is shown."""
    with toy_engine().session("a") as session:
        player = Player(session)
        player.close()
        player.show("b " * 13)
        player.playout = Told()
        player.press(Key("s"))
        try:
            assert player.said == "event 1 is dropped; kept; b goes back here"
            assert player.prompt == "a" and player.kept[0] == "a"
        finally:
            player.close()


def test_without_a_display_it_says_how(monkeypatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("cfengine.config.sys.platform", "linux")
    result = CliRunner().invoke(app, ["play", "--threads", "1"])
    assert result.exit_code == 2 and "xvfb-run" in result.output


def test_keys_of_a_script() -> None:
    assert scripted(("3:left", "3:s", "9:escape")) == {3: ["left", "s"], 9: ["escape"]}
    with pytest.raises(ConfigError, match="FRAME:KEY"):
        scripted(("left",))
    with pytest.raises(ConfigError, match="from 1 on"):
        scripted(("0:left",))


def test_a_picture_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    path = tmp_path / "missing" / "a.png"
    result = CliRunner().invoke(app, ["play", "--threads", "1", "--frames", "1", "--screenshot", str(path)])
    assert result.exit_code == 2 and "--screenshot" in result.output, result.output


@pytest.mark.embed
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--ring", "a/b"], "'a/b'"),
        (["--ring", ""], "''"),
        (["--ring", "x", "--format", "jpeg"], "nv12"),
        (["--ring", "x", "--seconds", "inf"], "--seconds is inf"),
        (["--ring", "x", "--seconds", "nan"], "--seconds"),
    ],
)
def test_a_wrong_call_of_serve_is_a_sentence_before_anything_loads(arguments: list[str], word: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", "no-such-model", *arguments])
    assert result.exit_code == 2 and word in result.output and "no-such-model" not in result.output, result.output
