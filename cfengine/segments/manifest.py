"""What an export folder holds: graphs, weight sets and their operands, read and held against the files.

The folder is written by `cfengine.export` and read by every backend that runs exported graphs. The manifest is written
last, so a folder without one is never taken for a whole export.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfengine.config import ModelConfig, VideoConfig
from cfengine.errors import ConfigError, ExportError
from cfengine.model.dit import CausalDiT

FORMAT, VERSION = "cfengine-export", 2
NAME = "manifest.json"
NORMS = "norms.safetensors"  # weights of the self-attentions' query and key norms, which lie between the segments
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BLOCK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class Operand:
    """One input or output of a graph; a dimension is a number, or "keys", "sessions", "72*sessions"."""

    name: str
    dtype: str  # a name of torch's: float32, float16, bfloat16
    shape: tuple[int | str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Graph:
    """An ONNX graph, and the weight files that it serves: one a layer, or one."""

    name: str
    file: str
    weights: tuple[str, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


@dataclass(frozen=True)
class Manifest:
    """The parsed `manifest.json` of a folder."""

    folder: Path
    model_name: str
    model_hash: str
    model: ModelConfig
    codec: str | None
    codec_hash: str | None  # of the decoder's weights
    codec_source: str | None  # where they came from, if not with the model
    precision: str
    opset: int
    chunk_frames: int
    grid: tuple[int, int]
    latent: tuple[int, int]
    sessions: int | str
    graphs: dict[str, Graph]
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256

    @property
    def layers(self) -> int:
        return self.model.layers

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def pixels(self) -> tuple[int, int]:
        """(width, height) of the video."""
        height, width = self.latent
        return width * VideoConfig.spatial_stride, height * VideoConfig.spatial_stride

    @property
    def command(self) -> str:
        """The command that makes this folder again."""
        return self.command_in(self.precision)

    def command_in(self, precision: str, *, model: str = "", pixels: tuple[int, int] | None = None) -> str:
        """The command that makes this folder in another precision, or of another model or size."""
        width, height = pixels or self.pixels
        more = {"size": f"{width}x{height}", "sessions": self.sessions if isinstance(self.sessions, int) else "open"}
        if self.codec == "taehv":
            more["taehv"] = self.codec_source or "FILE"
        return rebuild(self.folder, model or self.model_name, precision, more)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest and see that every file is there in full; ExportError says what is not."""
        folder = Path(folder)
        path = folder / NAME
        if not path.is_file():
            raise ExportError(
                f"{folder} has no {NAME}, so it is no export, or one that was not finished; run {rebuild(folder)}"
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("format") != FORMAT:
                raise ExportError(
                    f"{path} has format {found.get('format')!r} and not {FORMAT!r}; run {rebuild(folder)}"
                )
            if found["version"] != VERSION:
                raise ExportError(
                    f"{path} has version {found['version']} and this cfengine reads version {VERSION}; "
                    f"{'update cfengine' if found['version'] > VERSION else 'export again'}, or run {rebuild(folder)}"
                )
            manifest = cls._parse(folder, found)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError) as error:
            raise ExportError(f"{path} is damaged ({type(error).__name__}: {error}); run {rebuild(folder)}") from error
        manifest._check_sizes()
        return manifest

    @classmethod
    def _parse(cls, folder: Path, found: dict[str, Any]) -> Manifest:
        model = found["model"]
        sizes = {**model["config"], "patch": tuple(model["config"]["patch"])}
        graphs = {
            name: Graph(name, g["file"], tuple(g["weights"]), _operands(g["inputs"]), _operands(g["outputs"]))
            for name, g in found["graphs"].items()
        }
        for name in (file for graph in graphs.values() for file in (graph.file, *graph.weights)):
            found["files"][name]["sha256"]  # a graph is of files that are described
        PRECISIONS[found["precision"]]
        codec = found["codec"] or dict.fromkeys(("name", "hash", "source"))
        rows, columns = found["grid"]
        height, width = found["latent"]
        return cls(
            folder, model["name"], model["hash"], ModelConfig(**sizes), codec["name"], codec["hash"], codec["source"],
            found["precision"], found["opset"], found["chunk_frames"], (rows, columns), (height, width),
            found["sessions"], graphs, found["files"],
        )  # fmt: skip

    def _check_sizes(self) -> None:
        for name, about in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise ExportError(f"{path} is missing; run {self.command}")
            size = path.stat().st_size
            if size != about["bytes"]:
                raise ExportError(
                    f"{path} has {size} bytes and {NAME} says {about['bytes']}; it is truncated or was changed; "
                    f"run {self.command}"
                )

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Hash files (all, unless named); ExportError names the first that is not as the manifest says."""
        for name in self.files if names is None else names:
            got, wanted = file_hash(self.folder / name), self.files[name]["sha256"]
            if got != wanted:
                raise ExportError(
                    f"{self.folder / name} has hash {got[:12]} and {NAME} says {wanted[:12]}; it was changed or is "
                    f"damaged; run {self.command}"
                )

    def check_model(self, model: CausalDiT, where: str) -> None:
        """Raise ExportError unless the folder was made from these weights.  where: their name in messages"""
        got = model_hash(model, self.dtype)
        if got != self.model_hash:
            raise ExportError(
                f"{self.folder / NAME} was made from weights of hash {self.model_hash[:12]} ({self.model_name}), but "
                f"those of {where} have {got[:12]}; run {self.command_in(self.precision, model=where)}"
            )

    def graph(self, name: str) -> Graph:
        """A graph by name; ExportError lists what there is."""
        try:
            return self.graphs[name]
        except KeyError:
            raise ExportError(
                f"{self.folder} has no graph {name!r} (it has {', '.join(self.graphs)}); run {self.command}"
            ) from None


def _operands(found: list[dict[str, Any]]) -> tuple[Operand, ...]:
    return tuple(Operand(each["name"], each["dtype"], tuple(each["shape"])) for each in found)


def rebuild(
    folder: Path, model: str = "MODEL", precision: str = "fp32", more: Mapping[str, object] | None = None
) -> str:
    """The command that makes a folder again, for messages.  more: values of further options"""
    options = {"model": model, "precision": precision, **(more or {}), "out": folder}
    return f"cfengine export onnx {' '.join(f'--{name} {shlex.quote(str(value))}' for name, value in options.items())}"


def file_hash(path: Path) -> str:
    """SHA-256 of a file; ExportError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and the folders it lies in; OSError where the disk does not take it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(data)
        os.replace(fresh, path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def model_hash(model: CausalDiT, dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and bytes of a transformer's weights as they are in `dtype`."""
    return tensors_hash(model.state_dict(), dtype)


def tensors_hash(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and bytes of tensors as they are in `dtype`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {dtype}\n".encode())
        digest.update(_bytes(tensor.detach().to("cpu", dtype)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())
