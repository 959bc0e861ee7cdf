"""All that a session has become, as one value: in memory, or in a file of tensors and plain text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cfengine.config import EngineConfig
from cfengine.errors import OutputError, SnapshotError

if TYPE_CHECKING:
    from cfengine.memory.memory import Memory

FORMAT = 1
COUNTERS = ("seed", "start", "index", "chunks", "effort")  # first latent frame, video frame and chunk to come
POOL = ("memory.k", "memory.v", "memory.k_scale", "memory.v_scale")  # (layers, pages, ...), whole or page by page
SAMPLES = 64  # numbers of a weight that tell models apart
_KEY = "cfengine snapshot"
_PAST = re.compile(r"decoder\.[0-9]{1,6}")  # a part of the decoder's past, which differs from codec to codec


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A session between two chunks; made by `Session.snapshot`, for `Engine.resume` and `Session.rewind`.

    made_for: what an engine must be to take it (`made_for`)      about: counters, prompts and events, values of JSON
    tensors: pages, `memory.k.<layer>.<page>`, tables, latents and the decoder's past, by name; they are not written to
    """

    made_for: dict[str, Any]
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Size of its tensors, those that it shares with other snapshots of its session included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_made_for(self, wanted: dict[str, Any]) -> None:
        """Raise SnapshotError unless it is of an engine of `made_for(...) == wanted`, with counters and a script."""
        for name in sorted(wanted.keys() | self.made_for.keys()):
            has, wants = self.made_for.get(name), wanted.get(name)
            if has != wants:
                raise SnapshotError(
                    f"the snapshot was made with {name} {has!r} and this engine has {wants!r}; resume it with the "
                    "model and configuration that made it"
                )
        counts = [self.about.get(name) for name in COUNTERS]
        if not all(type(count) is int and 0 <= count < 2**64 for count in counts):
            raise _not_whole(["counters"])
        if not isinstance(self.about.get("director"), dict):
            raise _not_whole(["director"])

    def check(self, wanted: dict[str, Any], parts: dict[str, Tensor], latents: tuple[int, ...]) -> None:
        """`check_made_for`, and raise SnapshotError unless its tensors are those of such a session.

        parts: see `Lane.parts`      latents: shape of a chunk's
        """
        self.check_made_for(wanted)
        forms = {name: _form(part) for name, part in parts.items() if name not in POOL or name in self.tensors}
        wrong = [name for name, form in forms.items() if self._form(name) != form]
        pages = {} if wrong else dict(self._pages(parts))
        wrong += [name for name, form in pages.items() if form is None or self._form(name) != form]
        if "latents" in self.tensors and self._form("latents") != (latents, torch.float32):
            wrong.append("latents")
        known = forms.keys() | pages.keys() | {"latents"}
        past = {name for name in self.tensors if _PAST.fullmatch(name)}
        wrong = wrong or sorted(self.tensors.keys() - known - past)
        if wrong:
            raise _not_whole(wrong)

    def check_tables(self, memory: Memory) -> None:
        """Raise SnapshotError where tables say what those of a memory of the same shapes cannot say."""
        tables = {name: self.tensors[f"memory.{name}"] for name in memory.tables.tensors()}
        wrong = memory.misfits(tables, self.about["start"])
        if wrong:
            raise _not_whole([f"memory.{name}" for name in wrong])

    def _form(self, name: str) -> tuple | None:
        return _form(self.tensors[name]) if name in self.tensors else None

    def _pages(self, parts: dict[str, Tensor]) -> Iterator[tuple[str, tuple | None]]:
        """(name, form) of every page that must be there; no form where no memory has such a page."""
        for name in POOL:
            whole = parts.get(name)
            if whole is not None and name not in self.tensors:
                for layer, page, _ in shown_pages(self.tensors):
                    fits = page < whole.shape[1]
                    yield f"{name}.{layer}.{page}", (tuple(whole.shape[2:]), whole.dtype) if fits else None

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all.  Raises OutputError where it cannot be written."""
        path = Path(path)
        header = json.dumps({"format": FORMAT, "made_for": self.made_for, "about": self.about})
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        partial: Path | None = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.absolute().parent, suffix=".partial", delete=False) as file:
                partial = Path(file.name)
            save_file(tensors, partial, metadata={_KEY: header})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"the snapshot of {self.bytes} bytes cannot be written to {path} ({error}); free space or choose "
                "another place"
            ) from error
        finally:  # also where the user interrupts
            if partial is not None:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Snapshot:
        """Read a file of `save`, its tensors to a device.

        Raises SnapshotError where it is missing, damaged, no snapshot or of another format.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                header = header if isinstance(header, dict) else {}
                if header.get("format") != FORMAT:
                    raise SnapshotError(
                        f"{path} is {_described(header.get('format'))} and this version of cfengine reads snapshots of "
                        f"format {FORMAT}; take it again with this version"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = {name: header[name] for name in ("made_for", "about")}
                if not all(isinstance(part, dict) for part in about.values()):
                    raise ValueError("what it is about is no table")
                return cls(**about, tensors=tensors)
        except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
            raise SnapshotError(f"the snapshot {path} cannot be read ({error}); it is missing or damaged") from error


class SharedPages:
    """Copies of a session's pages for its snapshots, which share those that they have in common.

    A page that is shown does not change until its place is given to another frame, so (layer, place, frame) says what
    is in it, for as long as the session's past is not made anew (`forget`). A copy is let go with the last snapshot
    that has it.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Share nothing with snapshots taken before: pages are written again, or frames come a second time."""
        self._given: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()

    @torch.inference_mode()
    def taken(self, state: dict[str, Tensor], device: torch.device | str | None) -> dict[str, Tensor]:
        """A session's state with pages by themselves, those that its tables show, all copied to a device.

        state: `Lane.state`      device: None for where each tensor is      the copies are there when this returns
        """
        copies = {name: _copy(tensor, device) for name, tensor in state.items() if name not in POOL}
        shown = shown_pages(state)
        for name in POOL:
            if name not in state:
                continue
            for layer, page, source in shown:
                key = name, layer, page, source, str(device)
                copy = self._given.get(key)
                if copy is None:
                    self._given[key] = copy = _copy(state[name][layer, page], device)
                copies[f"{name}.{layer}.{page}"] = copy
        for place in {tensor.device for part in (state, copies) for tensor in part.values() if tensor.is_cuda}:
            torch.cuda.current_stream(place).synchronize()  # not the device: another thread may be capturing
        return copies


def shown_pages(state: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    """(layer, page, frame that it holds) of all that tables show, once each; page 0 stands for nothing."""
    rows = zip(*(state[f"memory.{name}"].tolist() for name in ("page_ids", "sources", "count")), strict=True)
    pairs = (
        (layer, ids[slot], sources[slot])
        for layer, (ids, sources, (count,)) in enumerate(rows)
        for slot in range(min(count, len(ids)))
    )
    return [found for found in dict.fromkeys(pairs) if found[1] > 0]


def _copy(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device or tensor.device).copy_(tensor)


def _form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _not_whole(names: list[str]) -> SnapshotError:
    return SnapshotError(f"the snapshot is not whole ({', '.join(names[:3])} missing or mis-shaped); take it again")


def _described(form: Any) -> str:
    return "no snapshot" if form is None else f"a snapshot of format {form!r}"


@torch.inference_mode()
def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, shapes and SAMPLES numbers of every weight, at equal distances from the first on.

    It tells a model from a fine-tune of it at the price of one transfer, whatever the device; weights that differ only
    in numbers between the samples look alike.
    """
    told, parts = hashlib.sha256(), []
    for name, weight in weights:
        told.update(f"{name} {tuple(weight.shape)} ".encode())
        flat = weight.reshape(-1)
        parts.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float())
    told.update(torch.cat(parts).cpu().numpy().tobytes())
    return told.hexdigest()[:16]


def made_for(config: EngineConfig, dtype: torch.dtype, weights: str) -> dict[str, Any]:
    """What decides whether a snapshot fits an engine, as values of JSON by name.

    weights: their `fingerprint`
    Which kernels run, on which device, is not part of it: elsewhere a stream goes on as near as rounding lets it.
    """
    values = {"codec": config.codec, "text": config.text, "dtype": str(dtype), "weights": weights}
    for name in ("model", "memory", "sampler", "video", "precision"):
        part = getattr(config, name)
        values |= {f"{name}.{field.name}": getattr(part, field.name) for field in dataclasses.fields(part)}
    return json.loads(json.dumps(values))
