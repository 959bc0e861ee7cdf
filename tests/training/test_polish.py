"""What the last passes of a student are taught by more passes of its own copy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.training import polish
from cfengine.training.data import COLUMNS, Batch, Strips
from cfengine.training.settings import Polish, Student
from cfengine.training.state import World

pytestmark = pytest.mark.cpu

CONFIG = EngineConfig(
    name="small",
    model=ModelConfig(dim=48, ffn_dim=96, heads=2, layers=2, text_dim=8, text_len=6, freq_dim=16),
    memory=MemoryConfig(policy="slow_fast_paper"),
    video=VideoConfig(width=96, height=32),
)


def world(seed: int = 0) -> World:
    torch.manual_seed(seed)
    made = World(CONFIG.model)
    torch.nn.init.normal_(made.dit.head.head.weight, std=0.2)  # a new world predicts zero
    return made


def batch(chunks: int = 3) -> Batch:
    torch.manual_seed(7)
    yaws = torch.arange(3 * chunks).view(1, chunks, 3).expand(2, -1, -1)
    return Batch(torch.randn(2, chunks, 3, 16, 4, 12), torch.randint(12, (2, chunks, 4)), yaws)


def test_levels_of_the_teacher_lie_below_the_pass() -> None:
    work = polish.Polishing(world(), CONFIG, Polish(passes=(1000, 750, 600, 250, 100)))
    second = work.levels.tolist()[1]
    assert second == pytest.approx(0.9375)  # step 750 of the student's 1000, 750, 500, 250
    assert polish.finer(second, work.fine) == pytest.approx([0.9375, 0.8823529, 0.625, 0.3571428])
    assert polish.finer(0.8, work.fine) == pytest.approx([0.8, 0.625, 0.3571428])


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_step_moves_the_student_towards_the_walk_and_not_the_copy(place: int, monkeypatch) -> None:
    """Where its copy's walk ends somewhere else, the loss is how far; a step makes it smaller."""
    given, walked = batch(), []
    inner = polish.walk

    def watched(of, context, x, levels):
        _, made = inner(of, context, x, levels)
        walked.append((of, len(levels)))
        return None, made + 0.5  # the student comes to its pass by itself

    monkeypatch.setattr(polish, "walk", watched)
    work = polish.Polishing(world(), CONFIG, Polish(steps=9, warm=1, peak=1e-2))
    before = copy.deepcopy(work.copy.state_dict())
    losses = []
    for _ in range(6):
        walked.clear()
        torch.manual_seed(5)
        last, measures = work.step(given, given.latents, place, np.random.default_rng(0), anchored=False)
        losses.append(measures[f"pass{place}"])
        student, teacher = work.student.world, work.copy
        assert last is None and set(measures) == {f"pass{place}"}
        assert [of is teacher for of, _ in walked] == [True]
        assert walked[-1][1] == (1 if place < 2 else len(polish.finer(work.levels[place].item(), work.fine)))
    assert losses[-1] < losses[0]
    if place < 2:
        assert losses[0] == pytest.approx(0.25, abs=0.01)  # the copy is the student: 0.5 squared, bfloat16 products
    assert all(torch.equal(before[name], now) for name, now in teacher.state_dict().items())
    assert not torch.equal(student.dit.head.head.weight, teacher.dit.head.head.weight)


def test_what_the_context_shows_holds_the_student() -> None:
    given, draw = batch(), np.random.default_rng(0)
    work = polish.Polishing(world(), CONFIG, Polish(steps=9))
    last, measures = work.step(given, given.latents, 2, draw, anchored=True)
    assert last.shape == given.latents.shape and not last.requires_grad
    assert set(measures) == {"pass2", "anchor", "held"} and all(np.isfinite(value) for value in measures.values())
    assert measures["held"] > 0, "the camera pans slowly, so chunks show what those before showed"


def test_shares_that_are_rounded_are_shares() -> None:
    draw = np.random.default_rng(0)
    assert {polish.chosen(draw, (0.2499, 0.25, 0.25, 0.25)) for _ in range(100)} == {0, 1, 2, 3}
    assert {polish.chosen(draw, (0.0, 0.0, 1.0)) for _ in range(20)} == {2}


def test_a_polish_goes_on_where_it_stopped(tmp_path) -> None:
    strips = Strips(torch.randn(3, 2, COLUMNS, 4, 16), torch.tensor([3, 6, 9]).expand(3, 2, 3).clone())
    batches, said = Student(short=(2, 2), long=(3, 3, 3), chunks=3, turns=2), []
    for steps in (2, 40):
        settings = Polish(steps=steps, passes=(250,), first=0.3, far=0.3)
        polish.train_polish(
            tmp_path / "p.state",
            world(),
            CONFIG,
            strips,
            0,
            settings,
            batches,
            lambda stage, values: said.append(values),
        )
        kept = torch.load(tmp_path / "p.state", weights_only=True)
        assert kept["step"] == steps
    assert [values["step"] for values in said] == [10, 20, 30, 40]
    assert {"pass0", "pass1", "pass2", "pass3", "anchor", "held"} <= set(said[-1])
