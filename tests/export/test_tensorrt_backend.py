"""Which backend runs the segments: measured once, remembered, refused where it cannot run."""

import json

import pytest
import torch

from cfengine.bench.synthetic import SIZES, random_engine, random_weights
from cfengine.engine import Engine
from cfengine.errors import ConfigError, ExportError
from cfengine.export.tensorrt_backend import one_pass, pass_seconds
from cfengine.model.dit import CausalDiT
from cfengine.ops import select
from cfengine.segments.choice import fastest
from cfengine.segments.torch import TorchSegments

pytestmark = pytest.mark.cpu

TOY = SIZES["toy"]


class Clock:
    """Seconds that are known, and how often they were asked for."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def measures(self):
        return {name: lambda name=name: self._measure(name) for name in self.seconds}

    def _measure(self, name):
        self.asked.append(name)
        if isinstance(self.seconds[name], Exception):
            raise self.seconds[name]
        return self.seconds[name]


def test_the_fastest_is_taken_and_remembered(tmp_path):
    kept, clock = tmp_path / "cache" / "backends.json", Clock(torch=2.0, tensorrt=1.0)
    assert [fastest(clock.measures(), kept, lambda: "gpu a") for _ in range(2)] == ["tensorrt", "tensorrt"]
    assert clock.asked == ["torch", "tensorrt"]
    clock.seconds["torch"] = 0.5
    assert fastest(clock.measures(), kept, lambda: "gpu b") == "torch"  # another GPU is measured anew
    assert fastest(clock.measures(), kept, lambda: "gpu a") == "tensorrt"
    assert json.loads(kept.read_text())["gpu b"] == {"torch": 0.5, "tensorrt": 1.0}


def test_a_backend_that_cannot_run_is_out(tmp_path):
    kept = tmp_path / "backends.json"
    for _ in range(2):  # it is said and tried again at every start
        clock = Clock(tensorrt=ExportError("a damaged plan"), torch=2.0)
        with pytest.warns(UserWarning, match="'tensorrt' is out of the choice: a damaged plan"):
            assert fastest(clock.measures(), kept, lambda: "a") == "torch"
        assert clock.asked == ["tensorrt", "torch"] and not kept.exists()
    with pytest.raises(ConfigError, match="nor this"):
        fastest(Clock(tensorrt=ExportError("not that"), torch=ConfigError("nor this")).measures(), kept, lambda: "b")
    with pytest.raises(ZeroDivisionError):  # a bug is no reason to take another backend
        fastest(Clock(tensorrt=ZeroDivisionError(), torch=1.0).measures(), kept, lambda: "c")


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"torch": 1.0}}', '{"a": {"torch": null, "tensorrt": null}}'])
def test_a_memory_that_is_of_no_use_is_made_anew(tmp_path, text):
    kept, clock = tmp_path / "backends.json", Clock(torch=2.0, tensorrt=1.0)
    kept.write_text(text)
    assert fastest(clock.measures(), kept, lambda: "a") == "tensorrt" and clock.asked == ["torch", "tensorrt"]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    assert fastest(Clock(torch=1.0).measures(), tmp_path / "file" / "backends.json", lambda: "a") == "torch"


def test_a_pass_runs_every_segment_and_repeats():
    model = CausalDiT(TOY.model)
    model.load_state_dict(random_weights(TOY.model))
    segments = TorchSegments(model.prepare(), select("cpu"), TOY.grid)
    run = one_pass(segments, TOY, model)
    with torch.inference_mode():
        assert torch.equal(run(), run())
    assert 0 < pass_seconds(segments, TOY, model, rounds=2) < 60


def test_tensorrt_needs_a_gpu_and_auto_does_without():
    engine = random_engine(TOY)
    parts = TOY, engine.model, engine.codec, engine.text
    with pytest.raises(ConfigError, match="'tensorrt' runs on a GPU; choose device 'cuda'"):
        Engine(*parts, backend="tensorrt")
    with Engine(*parts, backend="auto") as auto:
        frames = [frame.pixels for frame in auto.stream("a", num_frames=9)]
    with random_engine(TOY) as plain:
        for mine, other in zip(frames, plain.stream("a", num_frames=9), strict=True):
            assert (mine == other.pixels).all()
