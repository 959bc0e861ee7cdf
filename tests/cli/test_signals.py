"""Signals keep the frames, and end a run with the code that shells expect."""

import os
import re
import signal
import subprocess
import time

import pytest

from cfengine import cli_generate
from cfengine.cli_generate import Stopped, StopRequests
from cfengine.video import read_video

pytestmark = pytest.mark.cpu

PATIENCE = 300  # seconds that a busy machine may need for what takes one second


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_keeps_the_frames(tmp_path, number, code, played):
    command = played(0.05)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "out.mp4").exists() and (tmp_path / "out.mp4").stat().st_size > 2000)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, errors
    assert output == "begun\n" and "Traceback" not in errors
    told = re.search(r"stopped after (\d+) of 9600 frames; out.mp4: \1 frames", errors)
    assert told, errors
    assert len(list(read_video(tmp_path / "out.mp4"))) == int(told[1]) > 0
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_ctrl_c_before_the_first_frame(tmp_path, played):
    command = played(60)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"  # the first chunk takes a minute
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    last = errors.splitlines()[-1]
    assert last == "stopped after 0 of 9600 frames; nothing was written to out.mp4"
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_ctrl_c_while_loading(run, tmp_path):
    result = run("generate", "hills", engine=KeyboardInterrupt())
    assert result.exit_code == 130
    assert "stopped before the first frame; nothing was written" in result.stderr
    assert os.listdir(tmp_path) == []


def test_a_held_signal_waits_for_the_end_of_the_block():
    before = signal.getsignal(signal.SIGINT)
    steps = []
    with StopRequests() as stops:
        with pytest.raises(Stopped), stops.held():
            signal.raise_signal(signal.SIGINT)
            steps.append("the block went on")
        signal.raise_signal(signal.SIGINT)  # a second one does not interrupt the way out
        steps.append("so did the way out")
    assert len(steps) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_outside_a_held_block_is_raised_at_once():
    with StopRequests(), pytest.raises(Stopped) as caught:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal was not raised")
    assert cli_generate.exit_code(caught.value) == 143


def wait_for(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
