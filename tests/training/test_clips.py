"""Clips as batches, and one step of teacher and student on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.errors import CheckpointError, ConfigError
from cfengine.ops import select
from cfengine.training import distil
from cfengine.training.clips import Clips
from cfengine.training.diffusion import training_step
from cfengine.training.settings import Student
from cfengine.training.state import World

pytestmark = pytest.mark.cpu

CONFIG = EngineConfig(
    name="small",
    model=ModelConfig(dim=48, ffn_dim=96, heads=2, layers=2, text_dim=8, text_len=6, freq_dim=16),
    memory=MemoryConfig(policy="slow_fast_paper"),
    video=VideoConfig(width=48, height=32),
)


def write(folder, name: str, frames: int, words: int, **shapes) -> dict[str, torch.Tensor]:
    torch.manual_seed(frames)
    sizes = {"latents": (frames, 16, 4, 6), "text": (words, 8)} | shapes
    clip = {key: torch.randn(size).half() for key, size in sizes.items()}
    save_file(clip, folder / f"{name}.safetensors")
    return clip


def test_a_batch_is_the_beginning_of_clips_that_are_long_enough(tmp_path) -> None:
    write(tmp_path, "a", 8, 5)
    long = write(tmp_path, "b", 13, 2), write(tmp_path, "c", 12, 4)
    batch = Clips(tmp_path, CONFIG).draw(16, 4, np.random.default_rng(0))
    assert batch.latents.shape == (16, 4, 3, 16, 4, 6) and batch.prompts.shape == (16, 4, 4, 8)
    assert batch.latents.dtype == torch.float32 and batch.yaws is None
    drawn = set()
    for latents, prompts in zip(batch.latents, batch.prompts, strict=True):
        (which,) = (i for i in (0, 1) if torch.equal(latents.flatten(0, 1), long[i]["latents"][:12].float()))
        drawn.add(which)
        words = long[which]["text"].float()
        assert all(torch.equal(rows[: len(words)], words) and not rows[len(words) :].any() for rows in prompts)
    assert drawn == {0, 1}


def test_padding_a_prompt_changes_nothing(tmp_path) -> None:
    """Rows of zeros are what a model's own padding is, so the longest prompt of a batch does not touch the others."""
    world = World(CONFIG.model, words=0)
    latents, text = torch.randn(1, 2, 3, 16, 4, 6), torch.randn(1, 2, 3, 8)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 2))
    seen = [distil.context_of(world, CONFIG, latents, rows) for rows in (text, padded)]
    # bfloat16 products of other shapes: values near 1
    torch.testing.assert_close(seen[0].layers[1].keys, seen[1].layers[1].keys, atol=2e-2, rtol=0)
    assert seen[0].bias.exp().sum() == seen[1].bias.exp().sum() == CONFIG.model.text_len


def test_teacher_and_student_step_on_clips(tmp_path) -> None:
    write(tmp_path, "a", 9, 5)
    draw = np.random.default_rng(0)
    batch = Clips(tmp_path, CONFIG).draw(2, 3, draw)
    world = World(CONFIG.model, words=0)
    loss, made = training_step(world, CONFIG, batch, batch.latents, draw)
    loss.backward()
    assert made.shape == batch.latents.shape and world.dit.head.head.weight.grad.abs().max() > 0
    with torch.inference_mode():
        own = distil.roll_out(world, CONFIG, select("cpu"), batch, 1, [3, 4])
    assert torch.equal(own[:, 0], batch.latents[:, 0]) and not torch.equal(own[0, 1], own[1, 1])
    plan = Student(guidance=1.0, optimiser="adamw", betas=(0.0, 0.999), average_from=5)
    work = distil.Distillation(world.requires_grad_(False), CONFIG, plan)
    made = work.step(batch, own.clone(), 3, draw, anchored=False)
    assert set(made.measures) == {"gradient", "critic"} and all(map(np.isfinite, made.measures.values()))
    student = work.student
    assert all(map(torch.equal, student.average.parameters(), student.world.parameters())), "the average has not begun"


def test_clips_that_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="holds no .safetensors"):
        Clips(tmp_path, CONFIG)
    write(tmp_path, "a", 9, 5)
    with pytest.raises(ConfigError, match="no clip in .* has 4 chunks of 3 latent frames, the longest has 3"):
        Clips(tmp_path, CONFIG).draw(1, 4, np.random.default_rng(0))
    for share in ("shuttles", "jumps"):
        with pytest.raises(ConfigError, match=f"{share} is 0.5, and no camera of a clip"):
            Clips(tmp_path, CONFIG).draw(1, 1, np.random.default_rng(0), **{share: 0.5})
    write(tmp_path, "b", 9, 5, latents=(9, 16, 4, 8))
    with pytest.raises(CheckpointError, match=r"latents \(9, 16, 4, 8\) and text \(5, 8\); the model takes"):
        Clips(tmp_path, CONFIG)
    write(tmp_path, "b", 9, 7)
    with pytest.raises(CheckpointError, match="1 to 6, 8"):
        Clips(tmp_path, CONFIG)
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="b.safetensors cannot be read"):
        Clips(tmp_path, CONFIG)
