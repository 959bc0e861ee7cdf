"""`cfengine generate`: files hold what was made, whatever stops a run."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cfengine import cli_generate
from cfengine.cli import app
from cfengine.config import PRESETS
from cfengine.errors import KernelError, PromptError
from cfengine.video import read_video

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


def test_a_video_is_written_and_summed_up(run, fake_engine, tmp_path):
    engine = fake_engine()
    result = run("generate", "pan right", "-o", "a.mp4", "--seconds", "2", "--seed", "7", engine=engine)
    assert result.exit_code == 0, result.stderr
    assert engine.request == ("pan right", 7, 32)
    assert engine.stream_closed and engine.closed
    frames = list(read_video(tmp_path / "a.mp4"))
    assert len(frames) == 32 and frames[0].shape == (256, 384, 3)
    first, second = result.stdout.splitlines()
    assert first == "a.mp4: 32 frames, 2.0 s at 16 frames/s, 384x256"
    # 32 frames are chunks of 9, 12 and 11, each with 2 promotions and 1 eviction
    assert "chunk 60 ms, 6 promotions, 3 evictions" in second
    assert "\x1b" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("arguments", "frames"),
    [
        ([], 64),
        (["--seconds", "1.01"], 17),
        (["--frames", "5"], 5),
        (["--seconds", "0.001"], 1),
        (["--seconds", "0.3"], 5),
    ],
)
def test_lengths(run, fake_engine, arguments, frames):
    engine = fake_engine()
    assert run("generate", "hills", *arguments, engine=engine).exit_code == 0
    assert engine.request[2] == frames


def test_scale(run, fake_engine, tmp_path):
    run("generate", "hills", "--frames", "1", "--scale", "1", engine=fake_engine())
    assert next(read_video(tmp_path / "out.mp4")).shape == (64, 96, 3)


def test_wide_videos_keep_their_size():
    request = cli_generate.Request("hills", "out.mp4")
    assert [request.scale_for(width) for width in (96, 128, 144, 832)] == [4, 4, 1, 1]


@pytest.mark.parametrize("error", [KernelError("the pool is empty"), RuntimeError("boom")])
def test_an_error_in_the_middle_keeps_the_frames(run, fake_engine, tmp_path, error):
    engine = fake_engine(fail_at=21, error=error)
    result = run("generate", "hills", engine=engine)
    assert result.exit_code == 1
    assert f"{error}" in result.stderr
    assert "failed after 21 of 64 frames; out.mp4: 21 frames" in result.stderr
    assert len(list(read_video(tmp_path / "out.mp4"))) == 21
    assert engine.stream_closed and engine.closed


def test_an_error_in_the_first_chunk_leaves_no_file(run, fake_engine, tmp_path):
    result = run("generate", "hills", engine=fake_engine(fail_at=0, error=PromptError("'hills' is too long")))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: 'hills' is too long"
    assert os.listdir(tmp_path) == []


def test_the_engine_behind_the_command(run, tmp_path, toy_engine):
    result = run("generate", "a b", "--frames", "14", "--scale", "2", engine=toy_engine())
    assert result.exit_code == 0, result.stderr
    frames = list(read_video(tmp_path / "out.mp4"))
    assert len(frames) == 14 and frames[0].shape == (64, 96, 3)


def test_a_video_goes_on_from_a_file(run, tmp_path, fake_engine):
    """The engine is told which, and the file holds what was made alone."""
    engine = fake_engine()
    asked = {}
    stream = engine.stream
    engine.stream = lambda prompt, video=None, **options: asked.update(video=video) or stream(prompt, **options)
    (tmp_path / "in.mp4").write_bytes(b"a video")
    result = run("generate", "a b", "--frames", "14", "--video", "in.mp4", engine=engine)
    assert result.exit_code == 0, result.stderr
    assert str(asked["video"]) == "in.mp4" and len(list(read_video(tmp_path / "out.mp4"))) == 14


def test_the_default_command(monkeypatch, tmp_path):
    """The shipped model with its own prompt, over two chunks: a sky above a meadow, and not a still picture."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", "--frames", "21"])
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines() == ["loading tiny-world"] or "frames/s" in result.stderr
    assert "notice" not in result.stderr  # every word of the demo's prompt is known
    frames = np.stack(list(read_video(tmp_path / "out.mp4"))).astype(float)
    assert frames.shape == (21, 256, 384, 3)
    sky, ground = frames[:, :64].mean(axis=(0, 1, 2)), frames[:, -64:].mean(axis=(0, 1, 2))
    # the day palette: blue leads above the horizon, green below it, each by tens of levels
    assert sky[2] > sky[0] + 20
    assert ground[1] > ground[0] + 10 and ground[1] > ground[2] + 10
    assert np.abs(frames[0] - frames[-1]).mean() > 0.5  # a compressed still picture differs by about 0.1


def test_a_prompt_beyond_the_text_limit(run, tmp_path, toy_engine):
    result = run("generate", "word " * 13, engine=toy_engine())
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: the prompt has 13 words; this encoder takes 12"
    assert os.listdir(tmp_path) == []


def test_the_example_of_the_readme_runs(monkeypatch, toy_engine):
    import cfengine

    class ToyEngine:
        @staticmethod
        def from_pretrained(name):
            assert name in PRESETS
            return toy_engine()

    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.setattr(cfengine, "Engine", ToyEngine, raising=False)
    names = {}
    exec(example.replace("num_frames=129", "num_frames=14"), names)
    assert names["frame"].index == 13
    assert len(names["first"]) == 9 and len(names["second"]) == 12
