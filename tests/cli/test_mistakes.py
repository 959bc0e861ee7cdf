"""Mistakes on the command line are one sentence, before anything loads."""

import os

import pytest

from cfengine.config import POLICIES, PRESETS
from cfengine.errors import CheckpointError, KernelError, PromptError

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["", "-o", "a.mp4"], ["prompt is empty"]),
        ([" \n", "-o", "a.mp4"], ["prompt is empty"]),
        (["hills", "-o", "missing/a.mp4"], ["missing does not exist", "mkdir"]),
        (["hills", "-o", "."], ["is a folder"]),
        (["hills", "-o", "a.gif"], [".gif", ".mp4"]),
        (["hills", "-o", "/proc/a.mp4"], ["/proc"]),
        (["hills", "--seconds", "-1"], ["--seconds is -1"]),
        (["hills", "--seconds", "0"], ["--seconds is 0"]),
        (["hills", "--seconds", "nan"], ["--seconds is nan"]),
        (["hills", "--seconds", "inf"], ["--seconds is inf"]),
        (["hills", "--frames", "0"], ["--frames is 0"]),
        (["hills", "--frames", "9", "--seconds", "1"], ["--frames 9", "--seconds 1"]),
        (["hills", "--scale", "0"], ["--scale is 0"]),
        (["hills", "--threads", "0"], ["--threads is 0"]),
        (["hills", "--seed", "-5"], ["--seed is -5"]),
        (["hills", "--policy", "lru"], ["'lru'", *POLICIES]),
        (["hills", "--model", "tiny-wrld"], ["'tiny-wrld'", *PRESETS]),
        (["hills", "--size", "100x64"], ["width 100", "multiple of 8"]),
        (["hills", "--size", "huge"], ["--size is 'huge'"]),
        (["hills", "--dtype", "int4"], ["'int4'", "float32"]),
        (["hills", "--precision", "int4"], ["'int4'", "bf16, fp8"]),
        (["hills", "--device", "tpu"], ["'tpu'", "cuda:N"]),
        (["hills", "--image", "no.png"], ["--image no.png"]),
        (["hills", "--video", "no.mp4"], ["--video no.mp4"]),
        (["hills", "--video", "no.mp4", "--image", "no.png"], ["--image and --video"]),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_loads(run, tmp_path, arguments, words):
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "hills", "more"], "unexpected extra argument"),
        (["generate", "hills", "--seconds", "long"], "--seconds"),
        (["generate", "hills", "--frames", "1.5"], "--frames"),
        (["generate", "hills", "--colour", "red"], "--colour"),
        (["make"], "make"),
    ],
)
def test_a_wrong_call_is_usage_not_a_traceback(run, arguments, word):
    result = run(*arguments)
    assert result.exit_code == 2
    assert word in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("x.pt is cut short"), 2),
        (PromptError("the prompt has 20 words"), 2),
        (KernelError("no cuda"), 1),
    ],
)
def test_errors_while_loading(run, tmp_path, error, code):
    (tmp_path / "out.mp4").write_bytes(b"older")
    result = run("generate", "hills", engine=error)
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == f"error: {error}"
    assert (tmp_path / "out.mp4").read_bytes() == b"older"
