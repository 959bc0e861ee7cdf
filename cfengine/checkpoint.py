"""Files of weights: where they come from, and how they are read without running code that they carry."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfengine.errors import CheckpointError

SUFFIXES = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".bin.index.json")
LISTED = 8  # names shown of each kind of mismatch; the count is always given
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LFS = b"version https://git-lfs"


def fetch(source: str | Path, patterns: Sequence[str], what: str) -> Path:
    """Return the local file or folder of `source`, downloading only `patterns` when it is a hub id.

    source: existing path, or `owner/name` on the Hugging Face hub      what: noun for messages, such as "DiT weights"
    Raises CheckpointError when there is no such path, and when the hub cannot give the files.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(source)) or path.suffix in SUFFIXES:
        raise CheckpointError(
            f"{what}: no file or folder {str(source)!r}; check the path, or give a hub id (owner/name)"
        )
    wanted = ", ".join(patterns)
    try:
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise CheckpointError(
            f"{what}: {str(source)!r} is no local path, and {wanted} cannot be fetched from the hub repository of that "
            f"name ({type(error).__name__}: {reason}); check the name and the network, "
            "or download the files yourself and pass their folder"
        ) from error
    if not path.exists():
        raise CheckpointError(f"{what}: the hub repository {str(source)!r} has none of {wanted}; check the name")
    return path


def find(folder: Path, stems: Iterable[str]) -> Path | None:
    """Return the first weight file `folder/stem + suffix` that exists, safetensors before pickles."""
    for stem in stems:
        for suffix in SUFFIXES:
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return path
    return None


def nothing_found(folder: Path, wanted: Iterable[str], what: str) -> CheckpointError:
    """Build the error for a folder that holds none of the `wanted` files."""
    present = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(present[:LISTED]) + (f" and {len(present) - LISTED} more" if len(present) > LISTED else "")
    return CheckpointError(
        f"{what}: {folder} holds none of {', '.join(wanted)} (it holds {shown or 'nothing'}); "
        "pass the folder as published, or the file itself"
    )


def read(path: Path) -> dict[str, Any]:
    """Read a weight file: safetensors, a shard index, or a torch file (memory-mapped, `weights_only`).

    Returns tensors by name on the CPU; a torch file may nest them one level deeper, as it was saved.
    Raises CheckpointError for a file that is absent, truncated, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weight file {path} does not exist; check the path, or fetch the checkpoint again")
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if head == _LFS:
        raise CheckpointError(f"{path} is a Git LFS pointer and not the weights; run `git lfs pull` in its folder")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path} holds {type(found).__name__} and not named tensors; pass a state dict")
    return dict(found)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a weight file that must be a flat state dict; one level of `state_dict` or `model` is opened."""
    found = read(path)
    for key in ("state_dict", "model"):
        if isinstance(found.get(key), Mapping):
            found = dict(found[key])
    return only_tensors(found, path)


def only_tensors(found: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return `found` unchanged when every value is a tensor; CheckpointError names the others."""
    others = [f"{name} ({type(value).__name__})" for name, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path} is no state dict, for {_some(others)} are not tensors; pass the weights alone")
    return dict(found)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError when it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__} where an object is needed; fetch it again")
    return found


def check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], where: str, remedy: str) -> None:
    """Raise one CheckpointError that lists missing, extra and mis-shaped tensors, each kind with its count."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name].shape)} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
    parts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]
    if parts:
        raise CheckpointError(f"{where} does not fit: {'; '.join(parts)} ({len(expected)} tensors expected). {remedy}")


def _some(names: Sequence[str]) -> str:
    left = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {left} more" if left > 0 else "")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> Any:
    try:  # files saved before torch 1.6 are no zip archives and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if "weights_only" in str(error):  # torch advises to run what the file pickles; we never do
        reason = "it pickles more than tensors, or is damaged"
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is truncated, corrupt or no checkpoint: {reason}; fetch it again, "
        "or if it is whole but pickles more than tensors, save its state dict alone"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor to file; fetch it again")
    files = sorted(set(places.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} points outside its folder ({_some(outside)}); fetch it again")
    absent = [name for name in files if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(files)} shards and {len(absent)} are absent: {_some(absent)}; fetch them"
        )
    found: dict[str, Tensor] = {}
    for name in files:
        found.update(only_tensors(read(index.parent / name), index.parent / name))
    lost = [name for name in places if name not in found]
    if lost:
        raise CheckpointError(f"{index} names tensors that its shards lack: {_some(lost)}; fetch the shards again")
    return found
