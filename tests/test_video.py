"""Video files: what is written comes back, and a file cut short still plays."""

import os
import signal
import stat
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from cfengine.errors import OutputError
from cfengine.video import VideoWriter, check_output, read_video

pytestmark = pytest.mark.cpu

PALETTE = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [128, 128, 128], [255, 255, 255], [0, 0, 0], [200, 120, 40]],
    dtype=np.uint8,
)
# 8-bit limited-range YUV keeps a flat colour within 3 of 255, and x264 at crf 18 adds about 1. Treating BT.709 as
# BT.601 is off by 20 or more on the pure colours.
COLOUR_TOLERANCE = 6


def bars(height: int = 64, width: int = 96) -> np.ndarray:
    """Vertical bars of the palette, (height, width, 3)."""
    columns = np.arange(width) * len(PALETTE) // width
    return np.broadcast_to(PALETTE[columns], (height, width, 3)).copy()


def write(path, frames, **options):
    with VideoWriter(path, **{"fps": 16, **options}) as writer:
        for frame in frames:
            writer.write(frame)
    return writer


def test_frames_come_back_in_number_size_colour_and_time(tmp_path):
    path = tmp_path / "bars.mp4"
    writer = write(path, [bars()] * 21, scale=4)
    assert (writer.frames, writer.size, writer.seconds) == (21, (384, 256), 21 / 16)
    frames = list(read_video(path))
    assert len(frames) == 21
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((256, 384, 3), "uint8")}
    centres = 24 + 48 * np.arange(8)  # middle of each bar: chroma is halved, so edges mix
    for frame in (frames[0], frames[-1]):
        difference = np.abs(frame[128, centres].astype(int) - PALETTE)
        assert difference.max() <= COLOUR_TOLERANCE
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.codec_context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited
        times = [Fraction(frame.pts) * frame.time_base for frame in container.decode(stream)]
    assert times == [Fraction(index, 16) for index in range(21)]


def test_motion_keeps_its_order(tmp_path):
    """A white column at x = 8 * index: its place in a decoded frame tells which frame it is."""
    frames = []
    for index in range(12):
        frame = np.zeros((64, 96, 3), np.uint8)
        frame[:, 8 * index : 8 * index + 8] = 255
        frames.append(frame)
    write(tmp_path / "m.mp4", frames)
    found = [int(frame[32, :, 0].astype(float).argmax()) // 8 for frame in read_video(tmp_path / "m.mp4")]
    assert found == list(range(12))


def test_index_comes_before_the_pictures(tmp_path):
    write(tmp_path / "a.mp4", [bars()] * 40)
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")
    assert b"moof" not in content
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("fps", [16, 24, 30000 / 1001])
def test_rates(tmp_path, fps):
    write(tmp_path / "r.mp4", [bars()] * 10, fps=fps)
    with av.open(str(tmp_path / "r.mp4")) as container:
        # 1e-3: the file stores the rate as a fraction
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)


def test_a_killed_process_leaves_a_file_that_plays(tmp_path):
    script = f"""
import os, signal, numpy as np
from cfengine.video import VideoWriter
writer = VideoWriter({str(tmp_path / "k.mp4")!r}, fps=16)
for index in range(100):
    writer.write(np.full((64, 96, 3), index, np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    frames = list(read_video(tmp_path / "k.mp4"))
    assert 64 <= len(frames) <= 100  # what the encoder held back and the unfinished fragment are lost: under 36 frames
    assert abs(int(frames[50].mean()) - 50) <= COLOUR_TOLERANCE


def test_a_full_disk_is_a_sentence_and_the_file_plays(tmp_path):
    script = f"""
import resource, numpy as np
from cfengine.errors import OutputError
from cfengine.video import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
rng = np.random.default_rng(0)
writer = VideoWriter({str(tmp_path / "f.mp4")!r}, fps=16)
try:
    with writer:
        for index in range(500):
            writer.write(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
except OutputError as error:
    print(error)
print(writer.frames)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message, count = done.stdout.splitlines()
    assert "f.mp4 failed at frame" in message and f"{count} frames are in it" in message and "free space" in message
    assert int(count) >= 16
    assert len(list(read_video(tmp_path / "f.mp4"))) == int(count)
    assert os.listdir(tmp_path) == ["f.mp4"]


def test_no_frame_leaves_an_older_file_alone(tmp_path):
    path = tmp_path / "old.mp4"
    path.write_bytes(b"older")
    with VideoWriter(path, fps=16) as writer:
        assert writer.size == (0, 0)
    assert path.read_bytes() == b"older"


def test_permissions_survive_the_rewrite(tmp_path):
    path = tmp_path / "p.mp4"
    path.touch(mode=0o640)
    path.chmod(0o640)
    write(path, [bars()])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_names_that_look_like_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("take:1 %03d.mp4", [bars()] * 3)
    assert len(list(read_video("take:1 %03d.mp4"))) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/out.mp4", "does not exist; create it first"),
        ("folder", "is a folder"),
        ("folder.mp4", "is a folder"),
        ("out.gif", "'.gif'"),
        ("out", "no suffix"),
        ("file.txt/out.mp4", "is a file, not a folder"),
    ],
)
def test_places_that_cannot_hold_a_video(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=words) as caught:
        check_output(tmp_path / name)
    assert name.split("/")[0] in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_refuses_files(tmp_path):
    """/proc refuses new files even to root, whom permission bits do not stop."""
    with pytest.raises(OutputError, match="cannot write into the folder /proc"):
        check_output("/proc/out.mp4")


def test_a_good_place_is_left_untouched(tmp_path):
    assert check_output(tmp_path / "a.MP4") == tmp_path / "a.MP4"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((64, 96, 3), np.float32), "float32"),
        (np.zeros((64, 96), np.uint8), r"\(64, 96\)"),
        (np.zeros((64, 96, 4), np.uint8), r"\(64, 96, 4\)"),
        (np.zeros((63, 96, 3), np.uint8), "96x63 cannot be yuv420p"),
        (np.zeros((0, 96, 3), np.uint8), "96x0"),
    ],
)
def test_frames_that_are_none(tmp_path, frame, words):
    with VideoWriter(tmp_path / "a.mp4", fps=16) as writer, pytest.raises(OutputError, match=words):
        writer.write(frame)
    assert os.listdir(tmp_path) == []


def test_an_even_scale_makes_odd_sizes_possible(tmp_path):
    write(tmp_path / "a.mp4", [bars(33, 49)] * 2, scale=2)
    assert next(read_video(tmp_path / "a.mp4")).shape == (66, 98, 3)


def test_frames_of_two_sizes_do_not_mix(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", fps=16) as writer:
        writer.write(bars())
        with pytest.raises(OutputError, match="frame 1 is 48x32 but .* was begun with 96x64"):
            writer.write(bars(32, 48))
    assert len(list(read_video(tmp_path / "a.mp4"))) == 1


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": -1}, {"fps": float("nan")}, {"scale": 0}])
def test_settings_that_cannot_work(tmp_path, options):
    with pytest.raises(OutputError, match="is (0|-1|nan)"):
        VideoWriter(tmp_path / "a.mp4", **{"fps": 16, **options})


def test_reading_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(OutputError, match="cannot be read as a video"):
        list(read_video(tmp_path / "text.mp4"))
    with pytest.raises(OutputError, match="does not exist"):
        list(read_video(tmp_path / "none.mp4"))
