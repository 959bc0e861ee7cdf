"""The command line: mistakes are one sentence, files play whatever stops a run, help answers at once."""

import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from cfengine import cli_display, cli_generate, doctor
from cfengine.cli import app
from cfengine.cli_generate import Stopped, StopRequests
from cfengine.config import POLICIES, PRESETS, preset
from cfengine.errors import CheckpointError, KernelError, PromptError
from cfengine.types import ChunkTimings, Frame, LayerEvents
from cfengine.video import read_video

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent


class FakeEngine:
    """Grey frames in chunks of 9, 12, 12, ...; `fail_at` raises `error` in place of that frame, `delay` s a chunk."""

    def __init__(self, fail_at=None, error=None, delay=0.0):
        self.config = preset("tiny-world")
        self.fail_at, self.error, self.delay = fail_at, error, delay
        self.request, self.closed, self.stream_closed = None, False, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def stream(self, prompt, *, seed=0, num_frames=None):
        self.request = (prompt, seed, num_frames)
        try:
            for index in range(num_frames):
                chunk = 0 if index < 9 else 1 + (index - 9) // 12
                if index == 0 or (index - 9) % 12 == 0 and index >= 9:
                    time.sleep(self.delay)
                if index == self.fail_at:
                    raise self.error
                timings = ChunkTimings(chunk, denoise=0.05, decode=0.01, memory=LayerEvents(2, 1))
                yield Frame(np.full((64, 96, 3), index % 256, np.uint8), index, index / 16, timings)
        finally:
            self.stream_closed = True


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call the command in an empty folder, with a fake engine or with none that may be loaded."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, engine=None):
        def load(request):
            assert engine is not None, "the model was loaded"
            if isinstance(engine, BaseException):
                raise engine
            return engine

        monkeypatch.setattr(cli_generate, "load", load)
        return CliRunner().invoke(app, list(arguments))

    return call


def python(code, *arguments, **options):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)


# Mistakes -------------------------------------------------------------------------------------------------------------


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
        (["generate"], "prompt"),
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


# Streams --------------------------------------------------------------------------------------------------------------


def test_a_video_is_written_and_summed_up(run, tmp_path):
    engine = FakeEngine()
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
def test_lengths(run, arguments, frames):
    engine = FakeEngine()
    assert run("generate", "hills", *arguments, engine=engine).exit_code == 0
    assert engine.request[2] == frames


def test_scale(run, tmp_path):
    run("generate", "hills", "--frames", "1", "--scale", "1", engine=FakeEngine())
    assert next(read_video(tmp_path / "out.mp4")).shape == (64, 96, 3)


def test_wide_videos_keep_their_size():
    request = cli_generate.Request("hills", "out.mp4")
    assert [request.scale_for(width) for width in (96, 128, 144, 832)] == [4, 4, 1, 1]


@pytest.mark.parametrize("error", [KernelError("the pool is empty"), RuntimeError("boom")])
def test_an_error_in_the_middle_keeps_the_frames(run, tmp_path, error):
    engine = FakeEngine(fail_at=21, error=error)
    result = run("generate", "hills", engine=engine)
    assert result.exit_code == 1
    assert f"{error}" in result.stderr
    assert "failed after 21 of 64 frames; out.mp4: 21 frames" in result.stderr
    assert len(list(read_video(tmp_path / "out.mp4"))) == 21
    assert engine.stream_closed and engine.closed


def test_an_error_in_the_first_chunk_leaves_no_file(run, tmp_path):
    result = run("generate", "hills", engine=FakeEngine(fail_at=0, error=PromptError("'hills' is too long")))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: 'hills' is too long"
    assert os.listdir(tmp_path) == []


def test_the_engine_behind_the_command(run, tmp_path, toy_engine):
    result = run("generate", "a b", "--frames", "14", "--scale", "2", engine=toy_engine())
    assert result.exit_code == 0, result.stderr
    frames = list(read_video(tmp_path / "out.mp4"))
    assert len(frames) == 14 and frames[0].shape == (64, 96, 3)


@pytest.mark.skipif(
    not (ROOT / "cfengine/weights/tiny-world/dit.safetensors").exists(), reason="tiny-world is not trained"
)
def test_the_default_command(monkeypatch, tmp_path):
    """The shipped model, as `make demo` runs it, over two chunks: a sky above a meadow, and not a still picture."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", "pan right over a meadow, clear day", "--frames", "21"])
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


# Signals --------------------------------------------------------------------------------------------------------------

PATIENCE = 300  # seconds that a busy machine may need for what takes one second

SIGNALLED = textwrap.dedent("""
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("fake", sys.argv[1])
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    from cfengine import cli_generate
    from cfengine.cli import app

    class Loud(fake.FakeEngine):
        def stream(self, *arguments, **options):
            print("begun", flush=True)
            yield from super().stream(*arguments, **options)

    cli_generate.load = lambda request: Loud(delay=float(sys.argv[2]))
    app(["generate", "hills", "--seconds", "600"])
""")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_keeps_the_frames(tmp_path, number, code):
    command = [sys.executable, "-c", SIGNALLED, __file__, "0.05"]
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


def test_ctrl_c_before_the_first_frame(tmp_path):
    command = [sys.executable, "-c", SIGNALLED, __file__, "60"]
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


# Display --------------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_live_progress(tmp_path):
    main, other = pty.openpty()
    code = SIGNALLED.replace('"600"', '"2"')
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, __file__, "0.2"], cwd=tmp_path, stderr=other, env=environment
    )
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


def test_plain_progress_is_sparse(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(cli_display, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    show, tally = cli_display.PlainDisplay(), cli_generate.Tally(57)
    show.loading("tiny-world")
    show.begin(tally)
    for frame in FakeEngine().stream("hills", num_frames=57):
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


def test_warnings_are_notices_without_their_place(run):
    engine = FakeEngine()
    plain = engine.stream

    def stream(*arguments, **options):
        warnings.warn("tiny-world does not know and ignores: zebra", stacklevel=2)
        return plain(*arguments, **options)

    engine.stream = stream
    result = run("generate", "zebra", "--frames", "1", engine=engine)
    assert result.exit_code == 0
    assert result.stderr.splitlines()[1] == "notice: tiny-world does not know and ignores: zebra"


# The other commands ---------------------------------------------------------------------------------------------------


def test_help_and_mistakes_import_nothing_heavy():
    code = """
import sys
from cfengine.cli import app
try:
    app(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "numpy", "av", "transformers", "diffusers", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    for arguments in (["--help"], ["--version"], ["models"], ["generate", "--help"]):
        done = python(code, *arguments)
        assert done.returncode == 0, done.stderr
    mistake = python(code.replace('"numpy", "av", ', ""), "generate", "hills", "--policy", "lru")
    assert mistake.returncode == 0, mistake.stderr


def test_version(run):
    assert re.fullmatch(r"cfengine \d+\.\d+\.\d+\S*\n", run("--version").stdout)


def test_models_lists_presets_with_their_sources(run):
    output = run("models").stdout
    for name, config in PRESETS.items():
        line = next(line for line in output.splitlines() if line.startswith(name))
        for part in (config.dit_source, config.base_source, config.memory.policy, f"{config.video.width}x"):
            assert part in line


def test_doctor_says_what_serves_each_operation(run):
    from cfengine import ops

    result = run("doctor")
    for op, candidates in ops.choices("cpu").items():
        serving = next(name for name, available, _ in candidates if available)
        assert re.search(rf"{op} on cpu +{serving}\b", result.stdout)
    assert "cfengine._C" in result.stdout
    assert result.exit_code == (1 if "missing" in result.stdout else 0)


def test_doctor_names_the_command_that_adds_a_package(monkeypatch):
    real = doctor.importlib.util.find_spec
    absent = {"diffusers", "av"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    found = {finding.name: finding for finding in doctor.packages()}
    assert (found["diffusers"].state, found["diffusers"].remedy) == ("note", "pip install -e '.[wan]'")
    assert (found["av"].state, found["av"].remedy) == ("missing", "pip install -e .")
    assert found["numpy"].state == "ok"
    assert not doctor.Report({"packages": list(found.values())}).healthy


def test_doctor_says_why_the_core_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "cfengine._C", None)
    monkeypatch.delattr("cfengine._C", raising=False)
    (finding,) = doctor.core()
    assert finding.state == "note" and "not built" in finding.text and "pip install -e ." in finding.remedy


def test_bench_passes_through(run):
    unknown = run("bench", "nope")
    assert unknown.exit_code == 2
    assert re.search(r"unknown benchmark 'nope'; known: .*\bcpu\b", unknown.stderr)
    done = python("from cfengine.cli import app; app()", "bench", "cpu", "--help")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout
