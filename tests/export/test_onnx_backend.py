"""The engine on ONNX Runtime: recorded traces, the shipped model, the cache, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cfengine import Engine
from cfengine.errors import ConfigError
from cfengine.testing import replay

pytestmark = pytest.mark.cpu
DATA = Path(__file__).resolve().parents[1] / "data"
PROMPT = "pan right over a meadow, clear day"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("CFENGINE_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["dit_cf_roll", "dit_sf", "dit_longlive", "dit_infrope"])
def test_recorded_traces_replay(name, capsys) -> None:
    assert replay.main([str(DATA / f"{name}.safetensors"), "--backend", "onnxruntime"]) == 0
    assert "1 files" in capsys.readouterr().out


def pixels(engine: Engine, frames: int = 33) -> np.ndarray:
    return np.stack([frame.pixels for frame in engine.stream(PROMPT, seed=3, num_frames=frames)]).astype(int)


def test_the_shipped_model_streams_as_in_torch_and_exports_once(cache) -> None:
    steps: list[str] = []
    with Engine.from_pretrained("tiny-world") as engine:
        expected = pixels(engine)
    options = {"backend": "onnxruntime", "progress": lambda what, done, total: steps.append(what)}
    with Engine.from_pretrained("tiny-world", **options) as engine:
        # both sum in float32 in another order: a value at the edge of two levels may fall on either side
        assert np.abs(pixels(engine) - expected).max() <= 1
    assert steps and len(list((cache / "exports").iterdir())) == 1
    steps.clear()
    with Engine.from_pretrained("tiny-world", **options) as engine:
        assert np.abs(pixels(engine, 9) - expected[:9]).max() <= 1
    assert not steps  # found in the cache


def test_sessions_in_lock_step() -> None:
    with Engine.from_pretrained("tiny-world", backend="onnxruntime") as engine:
        with engine.session("hold, night", seed=5) as session:
            alone = session.next_chunk()[-1].pixels.astype(int)
        with engine.batch([PROMPT, "hold, night"], seeds=[4, 5]) as batch:
            together = batch.next_chunk()[1][-1].pixels.astype(int)
    assert np.abs(together - alone).max() <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "onnx"}, "unknown backend 'onnx'"),
        ({"backend": "onnxruntime", "dtype": "bfloat16"}, "runs in float32"),
        ({"backend": "torch", "exported": "somewhere"}, "reads no export, .* choose 'onnxruntime' or 'tensorrt'"),
        ({"backend": "tensorrt"}, "runs on a GPU"),
    ],
)
def test_what_cannot_be_is_said(options, words) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine.from_pretrained("tiny-world", **options)
