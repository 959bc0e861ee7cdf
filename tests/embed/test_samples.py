"""The sample window: what it shows is what was written, and what is pressed is what the writer hears."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfengine.embed import Ring, State, now_ns

pytestmark = [pytest.mark.embed, pytest.mark.hosts]

spec = importlib.util.spec_from_file_location("sample_tools", Path(__file__).with_name("sample_tools.py"))
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

WIDTH, HEIGHT, SCALE = 48, 32, 3
# SDL's software converts with coefficients of 6 bits, each off by 1/128 at most, times 219 of luma and twice 42 of
# chroma here: 2.4, and it rounds down where the truth is rounded to nearest: 3.4.
NV12_TOLERANCE = 3


# Pictures -------------------------------------------------------------------------------------------------------------


def rgba_frame(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """What sample_writer paints: (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    planes = (np.full_like(x, number), 5 * x + 3 * number, 7 * y + number)
    return (np.stack(planes, -1) % 256).astype(np.uint8)


def nv12_frame(number: int) -> np.ndarray:
    """The same as RGB: BT.709 of 16..235, in exact arithmetic."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    luma = ((5 * x + 3 * y + number) % 220) / 219.0
    blue, red = (90 + number % 80 - 128) / 224.0, (170 - number % 80 - 128) / 224.0
    kr, kb = 0.2126, 0.0722
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    return np.clip(np.rint(255 * np.stack([r, g, b], -1)), 0, 255).astype(np.uint8)


def enlarged(picture: np.ndarray) -> np.ndarray:
    return picture.repeat(SCALE, 0).repeat(SCALE, 1)


def shot(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def numbers(line: str) -> dict[str, float]:
    """The window's last line: name, number, name, number, ..."""
    words = line.split()
    return {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Path:
    """The sample, built as its documentation says."""
    build = tmp_path_factory.mktemp("view")
    tools.need("cmake", "cmake")
    configured = tools.run("cmake", "-S", tools.SAMPLES / "sdl", "-B", build, check=False)
    assert configured.returncode == 0, configured.stderr  # a missing SDL2 is said there
    tools.run("cmake", "--build", build)
    return build / "cfengine_view"


@pytest.fixture(scope="module")
def writer_program(tmp_path_factory) -> Path:
    source = Path(__file__).with_name("sample_writer.c")
    return tools.compile_c(tmp_path_factory.mktemp("writer") / "sample_writer", source, *tools.client_sources())


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    """A virtual X server."""
    xvfb = tools.need("Xvfb", "xvfb")
    with tools.Program(xvfb, "-displayfd", "1", "-screen", "0", "640x480x24", "-nolisten", "tcp") as server:
        number = server.wait_for("")
        while not number.isdigit():  # it may warn first
            number = server.wait_for("")
        yield f":{number}"
        server.process.terminate()


def environment(driver: str, request) -> dict[str, str]:
    """SDL_* for a driver: "dummy" keeps the window in memory, "x11" opens it on a virtual display."""
    chosen = {"SDL_VIDEODRIVER": driver, "SDL_RENDER_DRIVER": "software"}
    if driver == "x11":
        chosen["DISPLAY"] = request.getfixturevalue("display")
    return {**os.environ, **chosen}


@pytest.fixture
def ring() -> str:
    return f"samples-{os.getpid()}"


@pytest.fixture
def write(writer_program, ring):
    """Start a writer: write("rgba", 48, 32)."""

    def start(form: str = "rgba", width: int = WIDTH, height: int = HEIGHT, fps: int = 30):
        return tools.Program(writer_program, ring, form, str(width), str(height), str(fps))

    return start


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["dummy", "x11"])
def test_the_window_shows_every_pixel(driver, request, window, write, ring, tmp_path):
    file = tmp_path / "shot.bmp"
    command = [window, ring, "--scale", str(SCALE), "--frames", "12", "--screenshot", file]
    with write() as writer:
        writer.wait_for("ready")
        done = numbers(tools.run(*command, env=environment(driver, request)).stdout)
    assert done["new"] == 12 and done["frame"] >= 12
    np.testing.assert_array_equal(shot(file), enlarged(rgba_frame(int(done["frame"]))))


def test_nv12_has_its_colours(request, window, write, ring, tmp_path):
    file = tmp_path / "shot.bmp"
    command = [window, ring, "--scale", str(SCALE), "--frames", "6", "--screenshot", file]
    with write("nv12") as writer:
        writer.wait_for("ready")
        done = numbers(tools.run(*command, env=environment("dummy", request)).stdout)
    off = shot(file).astype(int) - enlarged(nv12_frame(int(done["frame"])))
    assert np.abs(off).max() <= NV12_TOLERANCE


def test_a_picture_is_shown_again_while_there_is_no_new_one(request, window, write, ring, tmp_path):
    file = tmp_path / "shot.bmp"
    command = [window, ring, "--scale", "1", "--frames", "3", "--screenshot", file]
    with write(fps=2) as writer:
        writer.wait_for("ready")
        done = numbers(tools.run(*command, env=environment("dummy", request)).stdout)
    assert done["new"] == done["uploads"] == 3 and done["repeated"] >= 4  # in a second, of 60 pictures
    np.testing.assert_array_equal(shot(file), rgba_frame(int(done["frame"])))


def test_a_window_of_another_shape_keeps_the_aspect(request, window, write, ring, tmp_path):
    file, env, xdotool = tmp_path / "shot.bmp", environment("x11", request), tools.need("xdotool", "xdotool")
    command = [window, ring, "--scale", str(SCALE), "--screenshot", file]
    with write() as writer, tools.Program(*command, env=env) as view:
        writer.wait_for("ready")
        view.wait_for("writer is running")
        tools.run(xdotool, "search", "--sync", "--name", ring, "windowsize", "--sync", "200", "100", env=env)
        tools.run(xdotool, "search", "--name", ring, "windowfocus", "--sync", "key", "Escape", env=env)
        view.end()
    picture = shot(file)
    assert picture.shape == (100, 200, 3)  # 48 x 32 becomes 150 x 100, between bars of 25
    assert not picture[:, :25].any() and not picture[:, 175:].any()
    assert picture[:, 25].any() and picture[:, 174].any()


def test_chunks_of_a_python_ring_are_played_in_time(request, window, ring, tmp_path):
    """Chunks published at once, with the times when their frames are due, as a session makes them."""
    file, period = tmp_path / "shot.bmp", 1_000_000_000 // 30
    command = [window, ring, "--scale", str(SCALE), "--frames", "30", "--screenshot", file, "--key-at", "4:Right"]
    events, published = [], 0
    with Ring(ring, width=WIDTH, height=HEIGHT, fps=30) as source:
        source.state = State.RUNNING
        with tools.Program(*command, env=environment("dummy", request)) as view:
            view.wait_for("writer is running")
            due = now_ns() + 2 * period
            while view.process.poll() is None:
                if due > now_ns() + 4 * period:
                    time.sleep(0.005)
                    continue
                events += source.events()
                told = events[-1].id if events else 0
                for _ in range(12):
                    published += 1
                    source.publish(rgba_frame(published), pts_ns=due, last_event_id=told)
                    due += period
            done = numbers(view.end()[-1])
    np.testing.assert_array_equal(shot(file), enlarged(rgba_frame(int(done["frame"]))))
    assert done["new"] == 30 and done["event"] == 2 and done["latency_ms"] > 0
    assert [(event.code, event.value) for event in events] == [(1, 1.0), (1, 0.0)]


# Writers that come and go ---------------------------------------------------------------------------------------------


def test_the_window_waits_for_a_writer_and_outlives_it(request, window, write, ring, tmp_path):
    file = tmp_path / "shot.bmp"
    command = [window, ring, "--scale", str(SCALE), "--screenshot", file]
    with tools.Program(*command, env=environment("dummy", request)) as view:
        view.wait_for(ring)  # the library's sentence: no ring of that name
        with write() as first:
            view.wait_for("writer found: 48 x 32 RGBA8")
            view.wait_for("writer is running")
            first.kill()
            view.wait_for("writer is gone")
        with write(width=64, height=20) as second:
            view.wait_for("writer restarted: 64 x 20 RGBA8")
            view.wait_for("writer is running")
            second.end()
            view.wait_for("writer is ended")
        view.process.terminate()  # SDL makes a quit event of it
        done = numbers(view.end()[-1])
    np.testing.assert_array_equal(shot(file), enlarged(rgba_frame(int(done["frame"]), 64, 20)))


# Keys -----------------------------------------------------------------------------------------------------------------


def test_scripted_keys_reach_the_writer(request, window, write, ring):
    keys = ["2:Left+", "3:Right+", "4:Right-", "5:Left-", "6:R", "7:Right"]
    keys += ["8:Tab", "8:=ein Wald bei Nacht, so wie", "8:=ä früher", "9:Backspace", "9:Return"]
    keys += ["10:Tab", "10:=never", "10:Escape", "16:Escape"]
    command = [window, ring, *[word for key in keys for word in ("--key-at", key)]]
    with write() as writer:
        writer.wait_for("ready")
        done = numbers(tools.run(*command, env=environment("dummy", request)).stdout)
        said = [line.split(" ", 2)[2] for line in writer.end() if line.startswith("event")]
    turns = ["action 1 -1", "action 1 0", "action 1 -1", "action 1 0", "reset", "action 1 1", "action 1 0"]
    assert said == [*turns, "prompt ein Wald bei Nacht, so wieä frühe"]
    assert done["event"] == 8  # frames say so
    assert 0 < done["latency_ms"] < 1000 * tools.PATIENCE


def test_the_keyboard_steers(request, window, write, ring):
    """Keys of an X server, up and down, through everything that lies between."""
    env = environment("x11", request)
    xdotool = tools.need("xdotool", "xdotool")
    with write() as writer, tools.Program(window, ring, "--scale", str(SCALE), env=env) as view:
        writer.wait_for("ready")
        view.wait_for("writer is running")
        tools.run(xdotool, "search", "--sync", "--name", ring, "windowfocus", "--sync", env=env)
        tools.run(xdotool, "keydown", "Left", env=env)
        writer.wait_for("event 1 action 1 -1")
        tools.run(xdotool, "keyup", "Left", env=env)
        writer.wait_for("event 2 action 1 0")
        tools.run(xdotool, "key", "space", env=env)
        writer.wait_for("event 3 pause")
        view.wait_for("writer is paused")
        tools.run(xdotool, "key", "space", env=env)
        writer.wait_for("event 4 resume")
        tools.run(xdotool, "key", "Tab", env=env)
        tools.run(xdotool, "search", "--sync", "--name", "^prompt: _$", env=env)  # before that SDL makes keys, no text
        tools.run(xdotool, "key", "r", "e", "d", env=env)
        tools.run(xdotool, "search", "--sync", "--name", "^prompt: red_$", env=env)
        tools.run(xdotool, "key", "Return", env=env)
        writer.wait_for("event 5 prompt red")
        tools.run(xdotool, "search", "--sync", "--name", f"^{ring} - running, .* key to picture [1-9]", env=env)
        tools.run(xdotool, "key", "Escape", env=env)
        done = numbers(view.end()[-1])
    assert done["latency_ms"] > 0


# Words ----------------------------------------------------------------------------------------------------------------


def test_a_missing_sdl_is_a_sentence(tmp_path):
    command = [tools.need("cmake", "cmake"), "-S", tools.SAMPLES / "sdl", "-B", tmp_path]
    without = tools.run(*command, "-DCMAKE_DISABLE_FIND_PACKAGE_SDL2=ON", check=False)
    assert without.returncode != 0 and "apt install libsdl2-dev" in " ".join(without.stderr.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the name of a ring is missing"),
        (["a", "--scale", "0"], "--scale needs a number from 1 to 16: 0"),
        (["a", "--key-at", "Left"], "--key-at needs FRAME:KEY"),
        (["a", "--frames"], "--frames needs a number"),
        (["a/b"], "that is no name of a ring"),
    ],
)
def test_wrong_words_are_refused(words, sentence, request, window):
    done = tools.run(window, *words, check=False, env=environment("dummy", request))
    assert done.returncode != 0 and sentence in done.stderr
