"""Progress: live on a terminal, sparse elsewhere, warnings as notices."""

import os
import pty
import re
import subprocess
import warnings
from types import SimpleNamespace

import pytest

from cfengine import cli_display, cli_generate

pytestmark = pytest.mark.cpu

PATIENCE = 300  # seconds that a busy machine may need for what takes one second


def test_a_terminal_shows_live_progress(tmp_path, played):
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(played(0.2, seconds=2), cwd=tmp_path, stderr=other, env=environment)
    os.close(other)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert process.wait(timeout=PATIENCE) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "frames/s, chunk 60 ms" in text and "promotions" in text and "evictions" in text
    assert "/32" in text


def test_plain_progress_is_sparse(monkeypatch, capsys, fake_engine):
    clock = [0.0]
    monkeypatch.setattr(cli_display, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    show, tally = cli_display.PlainDisplay(), cli_generate.Tally(57)
    show.loading("tiny-world")
    show.begin(tally)
    for frame in fake_engine().stream("hills", num_frames=57):
        clock[0] += 0.5
        show.update(tally, tally.add(frame))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading tiny-world"
    # a frame every half second, a line every five seconds
    told = [
        re.fullmatch(r"(\d+)/57 frames, [\d.]+ frames/s, chunk 60 ms, \d+ promotions, \d+ evictions", x)
        for x in lines[1:]
    ]
    assert [int(match[1]) for match in told] == [10, 20, 30, 40, 50]


def test_warnings_are_notices_without_their_place(run, fake_engine):
    engine = fake_engine()
    plain = engine.stream

    def stream(*arguments, **options):
        warnings.warn("tiny-world does not know and ignores: zebra", stacklevel=2)
        return plain(*arguments, **options)

    engine.stream = stream
    result = run("generate", "zebra", "--frames", "1", engine=engine)
    assert result.exit_code == 0
    assert result.stderr.splitlines()[1] == "notice: tiny-world does not know and ignores: zebra"
