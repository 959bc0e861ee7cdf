"""What plans are built with, and the name of everything that decides what each of them is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cfengine.export.calibrate import Calibration
from cfengine.export.tensorrt_quantise import SCALED
from cfengine.segments.manifest import Graph, Manifest
from cfengine.segments.tensorrt_plans import plans_folder

RECIPE = 2  # counts up when the same inputs are to give other plans, so that kept ones are not taken


@dataclass(frozen=True)
class Recipe:
    """What plans are built with."""

    manifest: Manifest
    trt: ModuleType
    target: str
    precision: str
    calibration: Calibration | None
    gpu: str = ""  # name of the GPU at hand where that is the target: another one of its capability has other timings

    @property
    def out(self) -> Path:
        return plans_folder(self.manifest.folder, self.target, self.precision, self.gpu)

    @property
    def symbols(self) -> dict[str, int]:
        """Values of open dimensions: a prompt is padded to its full length, so that shapes never change."""
        return {"keys": self.manifest.model.text_len, "sessions": 1}

    def largest(self, graph: str, index: int) -> dict[str, float]:
        """Weight of each product that is rounded -> largest magnitude that enters it."""
        if self.precision not in SCALED or graph not in ("first", "middle", "last"):
            return {}
        blocks = {
            "first": {"pre": 0},
            "middle": {"post": index, "pre": index + 1},
            "last": {"post": self.manifest.layers - 1},
        }
        found = {}
        for half, block in blocks[graph].items():
            for name, value in self.calibration.largest.items():
                words = name.split(".", 2)
                if words[1] == str(block) and (words[2] == "self_attn.qkv") == (half == "pre"):
                    found[f"{half}.{words[2]}.weight"] = value
        return found

    def key(self, graph: Graph, index: int, capability: str) -> str:
        """Hash of everything that decides what a plan is."""
        files = self.manifest.files
        parts = {
            "recipe": RECIPE,
            "library": [self.trt.__name__, self.trt.__version__],
            "capability": capability,
            "target": self.target,
            "gpu": self.gpu,
            "precision": self.precision,
            "symbols": self.symbols,
            "graph": files[graph.file]["sha256"],
            "weights": files[graph.weights[index]]["sha256"],
            "largest": self.largest(graph.name, index),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def holds(self, entry: dict[str, Any], capability: str) -> bool:
        """Whether what a description says of a plan is of these very inputs."""
        graph = self.manifest.graphs.get(entry["graph"])
        known = graph and entry["index"] < len(graph.weights)
        return bool(known) and entry["key"] == self.key(graph, entry["index"], capability)


def plan_name(graph: Graph, index: int) -> str:
    """ "middle.03", or "last" where a graph has one weight set."""
    return graph.name if len(graph.weights) == 1 else f"{graph.name}.{index:02d}"
