"""Files that are written whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from cfengine.errors import OutputError
from cfengine.segments.manifest import NAME, write_whole

CACHES = ("tensorrt", "calibration.json")  # what later commands add to an export, made from its graphs and weights
PAUSE = 0.1  # seconds between two looks at a lock that another process holds


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; OutputError where the disk does not take it."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise _unwritten(path, error) from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; OutputError where the disk does not take it."""
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
        path.chmod(0o644)  # safetensors keeps others out; a folder is made to be copied
    except Exception as error:  # safetensors raises types of its own beside the system's
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"{path} cannot be written ({reason}); free space, or choose another folder")


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let one process at a time write to `path`: others wait here until it is done, or has died.

    waiting: called once where another process holds the lock. The lock is a file beside `path` that the system lets go
    with its process; where a file system has no locks, writers rely on files and folders being replaced whole.
    """
    file, told = path.with_name(f".{path.name}.lock"), False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unwritten(path, error) from error
        if _taken(handle) and _same_file(handle, file):
            break
        os.close(handle)
        if not told:
            waiting()
        told = True
        time.sleep(PAUSE)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open; it serves the next writer
            if _same_file(handle, file):
                file.unlink()
        os.close(handle)


def _taken(handle: int) -> bool:
    """Lock an open file, or say that another process has; True as well where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        with suppress(OSError):
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            return True
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # such as a network drive without locks
        return True
    return True


def _same_file(handle: int, file: Path) -> bool:
    """Whether the name still means the file that was opened: who held the lock before has deleted it."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except OSError:
        return False


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` at the end, and leaves nothing behind where something fails.

    An export before it is moved aside first, and back where the new one cannot take its place. CACHES stay if the new
    export is of the same weights and sizes. The caller holds the lock of `out`.
    OutputError where `out` holds something other than an export.
    """
    out = Path(os.path.realpath(out))  # a link goes on pointing to it
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / NAME).is_file()):
        raise OutputError(f"{out} exists and is no export; choose a new folder, or delete it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error.strerror}); choose another folder") from error
    try:
        yield fresh
        try:
            os.chmod(fresh, 0o755)  # mkdtemp keeps others out
            _swap(fresh, out)
        except OSError as error:
            raise OutputError(f"{out} cannot be replaced ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, out: Path) -> None:
    if not out.exists():
        os.replace(fresh, out)
        return
    with locked(out / CACHES[0]):  # a build that is at work there finishes first
        pass
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    old = aside / "old"
    try:
        os.replace(out, old)
        try:
            os.replace(fresh, out)
        except OSError:
            os.replace(old, out)
            raise
    except OSError:
        with suppress(OSError):  # it is empty, or holds all that there is
            aside.rmdir()
        raise
    if _identity(old) == _identity(out):
        for name in CACHES:
            with suppress(OSError):  # what is not there, or stays behind, is made again
                os.replace(old / name, out / name)
    shutil.rmtree(aside, ignore_errors=True)


def _identity(folder: Path) -> list:
    """What plans and calibrations of an export are made from, beside its graphs, which each plan names by hash."""
    try:
        about = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return [about["model"]["hash"], about["chunk_frames"], about["latent"]]
    except (OSError, ValueError, LookupError, TypeError):
        return [folder]  # like no other
