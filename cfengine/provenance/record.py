"""What a file says of its making, as a C2PA manifest definition (C2PA 2.x, action `c2pa.created`)."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# IPTC's term for what a model made, https://cv.iptc.org/newscodes/digitalsourcetype/
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE_BY_MODEL = SOURCE_TYPES + "trainedAlgorithmicMedia"
HASHED_UP_TO = 256 * 2**20  # bytes of weights: a fraction of a second; several GB would make a user wait


@dataclass(frozen=True)
class Record:
    """What is told beside "synthetic, by cfengine"; what is left out is not told.

    model: its name, no path      weights: file whose SHA-256 is recorded where it has at most `HASHED_UP_TO` bytes
    prompt: told only by who asks for it, since a file travels further than its maker thinks
    """

    model: str = ""
    weights: Path | None = None
    seed: int | None = None
    prompt: str = ""

    def manifest(self, when: datetime | None = None) -> dict[str, Any]:
        """The definition that a C2PA builder takes; when: of the making, now where not given.

        Neither title nor file name is in it: names of files and folders tell of people.
        """
        maker = {"name": "cfengine", "version": _version()}
        made = {
            "action": "c2pa.created",
            "digitalSourceType": MADE_BY_MODEL,
            "when": (when or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "softwareAgent": maker,
        }
        # Text all through: a seed has 64 bits, and the builder's integers have 63.
        told = {
            "model": self.model,
            "weights_sha256": _hash(self.weights) if self.weights else "",
            "seed": "" if self.seed is None else str(self.seed),
            "prompt": self.prompt,
        }
        if parameters := {name: text for name, text in told.items() if text}:
            made["parameters"] = parameters
        actions = {"label": "c2pa.actions", "data": {"actions": [made]}, "created": True}
        return {"claim_generator_info": [maker], "assertions": [actions]}


SYNTHETIC = Record()  # says that a file is synthetic, and no more


def _hash(path: Path) -> str:
    """SHA-256 of a file in hex; empty where it is too large to hash in passing or cannot be read."""
    try:
        if path.stat().st_size > HASHED_UP_TO:
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _version() -> str:
    try:
        return importlib.metadata.version("cfengine")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
