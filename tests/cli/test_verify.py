"""`cfengine verify`, and what `cfengine generate` signs."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cfengine.provenance import verify
from cfengine.provenance.record import Record
from cfengine.video import VideoWriter, read_video

pytestmark = pytest.mark.cpu

pytest.importorskip("c2pa")

PATIENCE = 300  # seconds that a busy machine may need for what takes one second


@pytest.fixture
def made(run, fake_engine, tmp_path):
    """made(*options) -> path of a video that the command wrote, with what it printed checked for complaints."""

    def make(*options):
        result = run("generate", "a secret prompt", "--frames", "12", *options, engine=fake_engine())
        assert result.exit_code == 0 and "notice" not in result.stderr, result.stderr
        return tmp_path / "out.mp4"

    return make


def test_a_generated_file_is_verified(made, run):
    made("--seed", "7")
    result = run("verify", "out.mp4")
    assert result.exit_code == 0, result.stderr
    first, *lines = result.stdout.splitlines()
    assert first == "out.mp4: verified: the signature is valid and the file is as it was when it was signed"
    told = dict(line.split(maxsplit=1) for line in lines)
    assert told["says"] == "synthetic, made by a model or with one (trainedAlgorithmicMedia)"
    assert (told["content"], told["signature"]) == ("matches", "valid")
    assert (told["model"], told["seed"]) == ("tiny-world", "7")
    assert told["signer"].endswith("unverified cfengine user; the key of this user")
    assert "secret" not in result.stdout


def test_the_findings_as_json(made, run):
    made()
    found = json.loads(run("verify", "out.mp4", "--json").stdout)
    assert found["verified"] and found["state"] == "verified" and found["synthetic"] is True
    assert found["failures"] == [] and found["told"]["model"] == "tiny-world"


def test_the_prompt_is_told_only_when_asked(made):
    assert b"secret" not in made().read_bytes()
    assert verify(made("--record-prompt")).told["prompt"] == "a secret prompt"


def test_no_provenance(made, run):
    path = made("--no-provenance")
    assert b"c2pa" not in path.read_bytes()
    result = run("verify", "out.mp4")
    assert result.exit_code == 1
    assert result.stdout == "out.mp4: absent: it carries no C2PA record, so it says nothing of where it comes from\n"
    assert json.loads(run("verify", "out.mp4", "--json").stdout)["state"] == "absent"


def test_a_changed_file_is_told_from_one_without_a_record(made, run):
    path = made()
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    result = run("verify", "out.mp4")
    assert result.exit_code == 1
    assert result.stdout.startswith("out.mp4: tampered: the file or its record was changed after it was signed")
    assert "which cannot be relied on" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["verify", "absent.mp4"], "absent.mp4 cannot be read"),
        (["verify", "."], "cannot be read"),
        (["verify", "--trust", "absent.pem", __file__], "absent.pem cannot be read"),
        (["generate", "hills", "--record-prompt", "--no-provenance"], "exclude each other"),
    ],
)
def test_mistakes(run, arguments, sentence):
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr and result.stderr.startswith("error: ")


def test_a_missing_library_is_said_and_costs_no_frame(run, fake_engine, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)  # as if it were not installed
    result = run("generate", "hills", "--frames", "12", engine=fake_engine())
    assert result.exit_code == 0
    assert "notice: out.mp4 carries no record that it is synthetic: c2pa is not installed; pip install" in result.stderr
    assert len(list(read_video(tmp_path / "out.mp4"))) == 12
    assert run("verify", "out.mp4").exit_code == 2  # neither held nor refuted


@pytest.mark.parametrize("options", [[], ["--no-provenance"]])
def test_a_failed_run_is_signed_as_far_as_it_came(run, fake_engine, tmp_path, options):
    assert run("generate", "hills", *options, engine=fake_engine(fail_at=21, error=RuntimeError("boom"))).exit_code == 1
    report = verify(tmp_path / "out.mp4")
    assert report.state == ("absent" if options else "verified")
    assert len(list(read_video(tmp_path / "out.mp4"))) == 21


def test_an_interrupted_run_is_signed(tmp_path, played):
    process = subprocess.Popen(played(0.05), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path, end = tmp_path / "out.mp4", time.monotonic() + PATIENCE
    while not (path.exists() and path.stat().st_size > 2000):
        assert time.monotonic() < end, "no frame was written"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert os.listdir(tmp_path) == ["out.mp4"]
    frames = int(re.search(r"stopped after (\d+) of", errors)[1])
    assert len(list(read_video(path))) == frames > 0
    report = verify(path)
    assert report.verified and report.synthetic and report.told["model"] == "tiny-world"


def test_a_local_model_is_told_by_its_name_alone(tmp_path):
    from cfengine.cli_generate import Request, record_of
    from cfengine.config import preset

    model = tmp_path / "private" / "mine.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"weights")
    told = record_of(Request("hills", "out.mp4", model=str(model), seed=3), preset("context-forcing"))
    assert told == Record(model="mine.safetensors", weights=model, seed=3)
    assert "private" not in json.dumps(told.manifest())
    hub = record_of(Request("hills", "out.mp4", model="owner/name"), preset("context-forcing"))
    assert hub == Record(model="owner/name", seed=0)


def test_what_a_strangers_record_says_cannot_steer_the_terminal(run, tmp_path):
    with VideoWriter(tmp_path / "a.mp4", fps=16, record=Record(prompt="a\x1b[31mb\nc")) as writer:
        writer.write(np.zeros((64, 96, 3), np.uint8))
    output = run("verify", "a.mp4").stdout
    assert "\x1b" not in output and "a?[31mb?c" in output
