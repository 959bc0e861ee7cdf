"""The commands from the first stage to weights that an engine opens and benches measure, at the smallest effort."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from cfengine import Engine
from cfengine.config import ModelConfig
from cfengine.errors import CheckpointError, ConfigError
from cfengine.training.__main__ import main
from cfengine.training.recipe import STUDENT, Run, averaged, begin, changed, mean_of
from cfengine.training.settings import read
from cfengine.training.state import World

pytestmark = pytest.mark.cpu

MODEL = ModelConfig(patch=(1, 4, 1), dim=24, ffn_dim=48, heads=2, layers=3, text_dim=8, text_len=16, freq_dim=16)
# polish: of a batch's two steps both may be passes that only keep what they answer, which changes nothing
CONFIG = """
preset = "tiny-world"
model = {dim = 24, ffn_dim = 48, heads = 2, layers = 3, text_dim = 8, freq_dim = 16}
data = {scenes = 2, coupled = true}
codec = {steps = 1, decoder_steps = 1}
teacher = {steps = 2, lengths = [[2, 1, 1.0, 1.0]]}
lookup = {steps = 1}
student = {steps = 2, turns = 2, seeds = [1, 2], short = [2, 2], long = [2, 2, 2]}
polish = {steps = 12, passes = [500], blend = 0.75}
evaluation = {seeds = 1, seconds = 2.25, scenes = 1, times = [2.0]}
"""


def test_the_mean_of_students() -> None:
    first, second = World(MODEL).requires_grad_(False), World(MODEL).requires_grad_(False)
    mean = mean_of([first, second])
    torch.testing.assert_close(mean.table, (first.table + second.table) / 2)
    torch.testing.assert_close(mean_of([first, second], [0.9, 0.1]).table, 0.9 * first.table + 0.1 * second.table)
    assert not torch.equal(first.table, mean.table)


def test_a_folder_older_than_a_setting_was_begun_with_its_default(tmp_path) -> None:
    settings = read("tiny-world", ["student.guidance=0.5"])
    (tmp_path / "settings.json").write_text(json.dumps({"seed": 0, "student": {"steps": settings.student.steps}}))
    with pytest.raises(ConfigError, match=r"begun with student\.[a-z]+ .* and is now asked for"):
        begin(Run(tmp_path, settings), STUDENT)


def test_what_changed_is_named() -> None:
    known = {"seed": 0, "teacher": {"steps": 3, "peak": 0.1}, "model": {}}
    asked = {"seed": 0, "teacher": {"steps": 4, "peak": 0.1}, "model": {"dim": 8}, "student": {"steps": 1}}
    assert list(changed(known, asked)) == [("teacher.steps", 3, 4), ("model", {}, {"dim": 8})]


def test_teacher_student_and_evaluation_run_once_and_are_skipped_the_next_time(tmp_path, capsys) -> None:
    """Three commands, then `train`, which finds everything done."""
    config, out = tmp_path / "small.toml", tmp_path / "out"
    config.write_text(CONFIG)
    given = ["--config", str(config), "--out", str(out), "--processes", "1"]
    assert main(["student", *given]) == 2
    assert "lookup.state does not exist; train it first" in capsys.readouterr().err
    for command in ("teacher", "student", "evaluate"):
        assert main([command, *given]) == 0
    log = (out / "log.jsonl").read_text()
    states = {path: path.stat().st_mtime_ns for path in out.glob("*.state")}
    assert main(["train", *given]) == 0
    assert (out / "log.jsonl").read_text() == log
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.state")} == states
    assert {path.name for path in states} >= {"dit.state", "lookup.state", "student2.state", "polish.state"}
    assert {json.loads(line)["stage"] for line in log.splitlines()} >= {"codec", "decoder"}
    assert (out / "curves.png").stat().st_size > 1000
    settings = read(str(config))
    students = [averaged(out / f"student{own}.state", settings.config)[0] for own in (1, 2)]
    far = averaged(out / "polish.state", settings.config)[0].dit.patch_embedding.weight
    near = mean_of(students).dit.patch_embedding.weight
    assert not torch.equal(far, near)
    expected = (0.25 * near + 0.75 * far).half()
    assert torch.equal(load_file(out / "weights" / "dit.safetensors")["patch_embedding.weight"], expected)
    names = {record["name"] for record in json.loads((out / "evaluation.json").read_text())}
    assert {"sharpness", "recall_seconds_slow_fast_paper"} <= names
    with Engine.from_pretrained(out / "weights") as engine:
        assert engine.config.model == settings.config.model and engine.config.memory == settings.config.memory
    assert main(["teacher", *given, "--set", "teacher.peak=1e-3"]) == 2
    assert "was begun with teacher.peak 0.002 and is now asked for 0.001" in capsys.readouterr().err
    assert main(["export", str(out), str(tmp_path / "teacher"), "--config", str(config)]) == 0
    assert {path.name for path in (tmp_path / "teacher").iterdir()} == {
        "dit.state",
        "lookup.state",
        "refined.safetensors",
        "settings.json",
    }
    other = tmp_path / "other"
    again = ["student", *given[:2], "--out", str(other), "--processes", "1", "--teacher", str(tmp_path / "teacher")]
    assert main([*again, "--set", "student.steps=12"]) == 0
    strips = *other.glob("strips-*.safetensors"), out / "strips.safetensors"
    drawn, known = (load_file(path)["latents"] for path in strips)
    torch.testing.assert_close(drawn, known, atol=0.02, rtol=0.02)  # the codec was rounded to float16, as are strips
    assert (other / "weights" / "dit.safetensors").exists()
    for source, target, sentence in (
        (other / "weights", tmp_path / "none", "there is no teacher"),
        (out, out, "has training states"),
    ):
        assert main(["export", str(source), str(target), "--config", str(config)]) == 2
        assert sentence in capsys.readouterr().err
    plain = [*given[:2], "--out", str(tmp_path / "plain"), "--processes", "1", "--set", "data.coupled=false"]
    assert main(["student", *plain, "--teacher", str(tmp_path / "teacher")]) == 2
    assert "was made with data.coupled True, and a student with False" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert main([*again, "--set", "data.scenes=3"]) == 2
    assert "was begun with data.scenes 2" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["probe", str(out / "lookup.state"), "--config", str(config), "--passes", "2", "--scenes", "2"]) == 0
    assert re.match(r"step 1: \d\.\d\d landmarks a view, whole [01]\.\d{3}; of these tower", capsys.readouterr().out)
    assert main(["probe", str(out / "lookup.state"), "--config", str(config), "--passes", "0"]) == 2
    described = out / "weights" / "model.json"
    described.write_text(json.dumps({"model": {"dim": 24, "colour": 3}, "memory": {}}))
    with pytest.raises(CheckpointError, match="describes no model"):
        Engine.from_pretrained(out / "weights")


def test_the_memory_rule_travels_with_the_weights(tmp_path) -> None:
    from cfengine.sources import config_of
    from cfengine.training.recipe import write_weights

    settings = read("tiny-world", ["memory.slow=6", "memory.threshold=0.99", "model.dim=24", "model.ffn_dim=48"])
    write_weights(World(settings.config.model), tmp_path, settings.config)
    (tmp_path / "codec.safetensors").touch()
    opened = config_of(str(tmp_path))
    assert opened.memory == settings.config.memory and opened.model == settings.config.model
    assert opened.sampler == settings.config.sampler
    assert dataclasses.replace(opened, name="tiny-world") == settings.config
