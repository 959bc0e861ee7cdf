"""Folders and files that are whole or as they were, whatever fails and whoever writes beside."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from cfengine.errors import OutputError
from cfengine.export import files
from cfengine.export.calibrate import Calibration
from cfengine.export.files import locked, replaced, write
from cfengine.export.folder import export
from cfengine.segments.manifest import NAME, Manifest

pytestmark = pytest.mark.cpu


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with replaced(out) as folder:
        (folder / NAME).write_text("{}")
    assert [path.name for path in out.iterdir()] == [NAME]
    with pytest.raises(KeyboardInterrupt), replaced(out) as folder:
        (folder / "half").write_text("written")
        raise KeyboardInterrupt
    assert [path.name for path in out.iterdir()] == [NAME]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # and nothing is left beside it


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is no export; choose a new folder"), replaced(tmp_path):
        raise AssertionError("not reached")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_old_export_is_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / NAME).write_text("old")
    move = os.replace

    def refuse(source, target):
        if target == out and (source / NAME).read_text() == "new":
            raise PermissionError(13, "Permission denied")
        move(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OutputError, match="out cannot be replaced .Permission denied"), replaced(out) as folder:
        (folder / NAME).write_text("new")
    assert (out / NAME).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_goes_on_pointing_to_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replaced(tmp_path / "link") as folder:
        (folder / NAME).write_text("{}")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / NAME).is_file()


def about(weights: str, rows: int = 4) -> str:
    return json.dumps({"model": {"hash": weights}, "chunk_frames": 3, "latent": [rows, 6]})


@pytest.mark.parametrize(("again", "stays"), [(about("a"), True), (about("b"), False), (about("a", 8), False)])
def test_plans_stay_with_the_weights_and_sizes_that_they_are_of(tmp_path, again, stays):
    out = tmp_path / "out"
    with replaced(out) as folder:
        (folder / NAME).write_text(about("a"))
    write(out / "tensorrt" / "rtx-bf16" / "timing.cache", b"timings")
    write(out / "calibration.json", b"scales")
    with replaced(out) as folder:
        (folder / NAME).write_text(again)
    assert (out / NAME).read_text() == again
    assert (out / "tensorrt" / "rtx-bf16" / "timing.cache").is_file() == stays
    assert (out / "calibration.json").is_file() == stays


# Locks ----------------------------------------------------------------------------------------------------------------


def test_one_at_a_time_and_nothing_left(tmp_path):
    inside, most, waited = [], [], []

    def work(name: int) -> None:
        with locked(tmp_path / "out", lambda: waited.append(name)):
            inside.append(name)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1] and len(waited) == len(set(waited)) >= 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_lets_go(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from cfengine.export.files import locked\n"
        "with locked(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False).returncode == 9
    assert (tmp_path / ".out.lock").exists()
    with locked(tmp_path / "out", lambda: pytest.fail("it waits for a process that is gone")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_first_uses_takes_what_the_first_made(small, small_model, tmp_path):
    pytest.importorskip("onnxscript")
    out, made, told = tmp_path / "out", [], []

    def use(progress=None) -> None:
        options = {"graphs": ("first",), "once": True, "progress": progress}
        made.append(export(small, small_model, out, **options))

    with locked(out):
        second = threading.Thread(target=use, args=(lambda what, done, total: told.append(what),))
        second.start()
        while not told:
            time.sleep(0.01)
        with replaced(out) as folder:  # the first one's export, as it might be
            export(small, small_model, folder, graphs=("first",))
        stamp = (out / NAME).stat().st_mtime_ns
    second.join()
    assert told == ["waiting for another process that writes there"]
    assert made == [Manifest.load(out)] and (out / NAME).stat().st_mtime_ns == stamp


# What a disk does not take --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, "first.onnx", "calibration.json"])
def test_a_full_disk_is_a_sentence(small, small_model, tmp_path, monkeypatch, name):
    pytest.importorskip("onnxscript")
    whole = files.write_whole

    def full(path, data):
        if path.name == name:
            raise OSError(28, "No space left on device")
        whole(path, data)

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(OutputError, match=f"{name} cannot be written .No space left on device"):
        if name == "calibration.json":
            Calibration("a", "made up", {}).save(tmp_path)
        else:
            export(small, small_model, tmp_path / "out", graphs=("first",))
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_is_whole_or_as_it_was(tmp_path, monkeypatch):
    first = Calibration("a", "made up", {"blocks.0.ffn.0": 1.0})
    first.save(tmp_path)

    def cut_off(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", cut_off)
    with pytest.raises(OutputError):
        dataclasses.replace(first, made_from="again").save(tmp_path)
    assert Calibration.load(tmp_path, "a") == first
