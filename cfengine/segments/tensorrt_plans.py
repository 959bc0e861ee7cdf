"""Folders of TensorRT plans: what each holds, for which GPU, and whether it fits where it is to run."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cfengine.errors import ExportError
from cfengine.segments.manifest import Manifest

FORMAT, VERSION = "cfengine-plans", 1
NAME = "plans.json"
CACHE = "runtime.cache"  # kernels that a runtime compiled for the GPU at hand


@dataclass(frozen=True)
class PlanFile:
    """One engine. index: weight set of its graph      sizes in bytes; workspace: scratch memory while it runs"""

    graph: str
    index: int
    path: Path
    bytes: int
    sha256: str
    weight_bytes: int
    workspace_bytes: int
    products: dict[str, str]  # weight of each product -> precision it is multiplied in
    onnx_sha256: str  # of the graph and of the weights that it was built from
    weights_sha256: str

    def read(self, command: str) -> bytes:
        """The plan; ExportError where it is missing, truncated or changed."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise ExportError(f"{self.path} cannot be read ({error.strerror}); run {command}") from error
        if len(data) != self.bytes:
            raise ExportError(
                f"{self.path} has {len(data)} bytes and {NAME} says {self.bytes}; it is truncated or was changed; "
                f"run {command}"
            )
        got = hashlib.sha256(data).hexdigest()
        if got != self.sha256:
            raise ExportError(
                f"{self.path} has hash {got[:12]} and {NAME} says {self.sha256[:12]}; it was changed or is damaged; "
                f"run {command}"
            )
        return data


@dataclass(frozen=True)
class Plans:
    """The plans of a folder for one GPU target.

    symbols: values of the dimensions that the export left open, such as {"keys": 512}
    """

    folder: Path
    library: str
    library_version: str
    model_hash: str
    target: str
    precision: str
    capability: str
    symbols: dict[str, int]
    files: dict[tuple[str, int], PlanFile]
    command: str

    @property
    def cache(self) -> Path:
        """Where a runtime keeps the kernels that it compiled."""
        return self.folder / place(self.capability) / CACHE

    @classmethod
    def load(cls, folder: str | Path, capability: str) -> Plans:
        """Read the plans for a compute capability such as "8.9"; ExportError says what there is instead."""
        folder = Path(folder)
        found = describe(folder)
        try:
            command = found["command"]
            if capability not in found["targets"]:
                why = found["skipped"].get(capability)
                there = ", ".join(found["targets"]) or "no GPU at all"
                raise ExportError(
                    f"{folder} has plans for compute capability {there} and this GPU has {capability}"
                    f"{f', which was left out: {why}' if why else ''}; run {_current(command)} on this machine"
                )
            files = {}
            for about in found["targets"][capability]["plans"].values():
                known = {field.name: about[field.name] for field in fields(PlanFile)}
                file = PlanFile(**known | {"path": folder / place(capability) / about["path"]})
                files[file.graph, file.index] = file
            return cls(
                folder, found["library"]["name"], found["library"]["version"], found["model"]["hash"], found["target"],
                found["precision"], capability, found["symbols"], files, command,
            )  # fmt: skip
        except (LookupError, TypeError, AttributeError) as error:
            raise damaged(folder, error) from error

    def check(self, manifest: Manifest) -> None:
        """Raise ExportError unless these plans were built from that export."""
        if self.model_hash != manifest.model_hash:
            raise ExportError(
                f"{self.folder / NAME} was built from weights of hash {self.model_hash[:12]}, but those of "
                f"{manifest.folder} have {manifest.model_hash[:12]}; run {self.command}"
            )
        for file in self.files.values():
            graph = manifest.graph(file.graph)
            built = {graph.file: file.onnx_sha256, graph.weights[file.index]: file.weights_sha256}
            for source, built_from in built.items():
                wanted = manifest.files[source]["sha256"]
                if built_from != wanted:
                    raise ExportError(
                        f"{file.path} was built from a {source} of hash {built_from[:12]} and {manifest.folder} has "
                        f"{wanted[:12]}; run {self.command}"
                    )

    def file(self, graph: str, index: int) -> PlanFile:
        """The plan of a graph with a weight set; ExportError where it was not built."""
        try:
            return self.files[graph, index]
        except KeyError:
            raise ExportError(f"{self.folder} has no plan of {graph} {index}; run {self.command}") from None


def describe(folder: Path) -> dict[str, Any]:
    """The parsed `plans.json` of a folder; ExportError where it is missing, damaged or of another version."""
    path = folder / NAME
    if not path.is_file():
        raise ExportError(
            f"{folder} has no {NAME}, so it has no plans, or the build was not finished; run {_guess(folder)}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["version"] != VERSION:
            raise ExportError(
                f"{path} is {found['format']} {found['version']} and this cfengine reads {FORMAT} {VERSION}; "
                f"run {_guess(folder)}"
            )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise damaged(folder, error) from error
    return found


def damaged(folder: Path, error: Exception) -> ExportError:
    """The error for a description that cannot be read."""
    return ExportError(f"{folder / NAME} is damaged ({type(error).__name__}: {error}); run {_guess(folder)}")


def place(capability: str) -> str:
    """Folder of a target: "8.9" -> "sm89"."""
    return f"sm{capability.replace('.', '')}"


def plans_folder(export: Path, target: str, precision: str, gpu: str = "") -> Path:
    """Where the plans of an export lie.  gpu: name of the one that they were built on, where they are for that alone"""
    return export / "tensorrt" / "-".join(filter(None, (target, precision, re.sub(r"\W+", "_", gpu))))


def command(export: Path, target: str, precision: str) -> str:
    """The command that builds plans."""
    return f"cfengine export tensorrt {export} --target {target} --precision {precision}"


def _guess(folder: Path) -> str:
    """The command that builds a folder whose description is of no help: its name says target and precision."""
    target, precision, *_ = (*folder.name.split("-", 2), "")
    return command(folder.parent.parent, target or "rtx", precision or "bf16")


def _current(text: str) -> str:
    return text.replace("--target rtx", "--target current")
