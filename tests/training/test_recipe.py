"""The recipe from the first stage to files that an engine loads, at the smallest effort."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from cfengine.config import ModelConfig, preset
from cfengine.training.recipe import STUDENTS, Effort, Log, averaged, mean_of, train
from cfengine.training.state import World

pytestmark = pytest.mark.cpu

MODEL = ModelConfig(patch=(1, 4, 1), dim=24, ffn_dim=48, heads=2, layers=2, text_dim=8, text_len=16, freq_dim=16)
EFFORT = Effort(codec_steps=1, decoder_steps=1, scenes=2, dit_steps=1, distil_steps=2)


def test_the_mean_of_students() -> None:
    first, second = World(MODEL).requires_grad_(False), World(MODEL).requires_grad_(False)
    mean = mean_of([first, second])
    torch.testing.assert_close(mean.table, (first.table + second.table) / 2)
    assert not torch.equal(first.table, mean.table)


@pytest.mark.slow
def test_every_stage_runs_once_and_is_skipped_the_next_time(tmp_path) -> None:
    config = dataclasses.replace(preset("tiny-world"), model=MODEL)
    for _ in range(2):
        folder = train(tmp_path, 0, EFFORT, Log(tmp_path / "log.jsonl"), processes=1, config=config)
    stages = [json.loads(line)["stage"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [stages.count(stage) for stage in ("codec", "decoder")] == [1, 1]
    names = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert set(names) == {"codec.safetensors", "dit.safetensors", "text.safetensors"}
    students, steps = zip(*(averaged(tmp_path / f"student{own}.state", config) for own in STUDENTS), strict=True)
    assert steps == (4, 4)  # whole batches
    expected = mean_of(list(students)).dit.patch_embedding.weight.half()
    assert torch.equal(names["dit.safetensors"]["patch_embedding.weight"], expected)
