"""One small model and one export of it, for everything that reads a folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.model.dit import CausalDiT
from cfengine.segments.manifest import NAME, Manifest, file_hash

# three layers: two weight sets of `middle`, so that one graph does serve several
SMALL = EngineConfig(
    name="small",
    model=ModelConfig(dim=48, ffn_dim=96, heads=2, layers=3, text_dim=8, text_len=12, freq_dim=16),
    memory=MemoryConfig(),
    video=VideoConfig(width=48, height=32),
    codec="tiny_world",
)


@pytest.fixture(scope="session")
def small() -> EngineConfig:
    return SMALL


@pytest.fixture(scope="session")
def small_model() -> CausalDiT:
    """Random weights, equal ones among them: norms of ones and biases of zeros, as a fresh model has."""
    import torch

    torch.manual_seed(0)
    model = CausalDiT(SMALL.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model.prepare()


@pytest.fixture(scope="session")
def small_codec():
    import torch

    from cfengine.codec.tiny_world import TinyWorldCodec

    torch.manual_seed(1)
    return TinyWorldCodec()


@pytest.fixture(scope="session")
def whole(tmp_path_factory, small_model, small_codec) -> Manifest:
    """An export of everything, for any number of sessions. Tests read it; those that change files take `copied`."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from cfengine.export.folder import export

    folder = tmp_path_factory.mktemp("export") / "whole"
    return export(SMALL, small_model, folder, codec=small_codec, sessions="sessions")


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """A copy of `whole` to damage."""
    return Path(shutil.copytree(whole.folder, tmp_path / "copied"))


@pytest.fixture
def edit_manifest():
    """edit(folder, change): apply `change(description)` to a manifest."""

    def edit(folder: Path, change) -> None:
        description = json.loads((folder / NAME).read_text())
        change(description)
        (folder / NAME).write_text(json.dumps(description))

    return edit


@pytest.fixture
def rehashed(edit_manifest):
    """rehashed(folder, name): make the manifest agree with a file that was changed."""

    def agree(folder: Path, name: str) -> None:
        path = folder / name
        about = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        edit_manifest(folder, lambda description: description["files"].update({name: about}))

    return agree


@pytest.fixture
def with_layers():
    """with_layers(n): the small configuration at another depth."""
    return lambda layers: dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, layers=layers))
