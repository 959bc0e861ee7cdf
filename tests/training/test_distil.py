"""Distribution matching: where its gradient points, and which weights it reaches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.training import distil
from cfengine.training.data import Batch
from cfengine.training.state import World

pytestmark = pytest.mark.cpu

CONFIG = EngineConfig(
    name="small",
    model=ModelConfig(dim=48, ffn_dim=96, heads=2, layers=2, text_dim=8, text_len=6, freq_dim=16),
    memory=MemoryConfig(policy="slow_fast_paper"),
    video=VideoConfig(width=48, height=32),
)


def world(seed: int) -> World:
    torch.manual_seed(seed)
    made = World(CONFIG.model)
    torch.nn.init.normal_(made.dit.head.head.weight, std=0.2)  # a new world predicts zero
    return made


def batch(chunks: int = 3) -> Batch:
    torch.manual_seed(7)
    video = CONFIG.video
    shape = (2, chunks, CONFIG.memory.chunk_frames, 16, video.latent_height, video.latent_width)
    return Batch(torch.randn(shape), torch.randint(12, (2, chunks, 4)))


@pytest.fixture
def contexts():
    given = batch()
    return given, lambda of: distil.context_of(of, CONFIG, given.latents, given.concepts)


def test_equal_judges_leave_a_sample_alone(contexts) -> None:
    given, see = contexts
    teacher = world(0)
    seen = see(teacher)
    draw = np.random.default_rng(0)
    gradient = distil.matching_gradient(teacher, copy.deepcopy(teacher), (seen, seen), given.latents[None], draw)
    assert gradient.abs().max() == 0


def test_the_gradient_moves_a_sample_from_the_critic_towards_the_teacher(contexts) -> None:
    """A critic whose flow is one lower denoises to values higher by sigma: the sample is told to go down."""
    given, see = contexts
    teacher = world(0)
    critic = copy.deepcopy(teacher)
    with torch.no_grad():
        critic.dit.head.head.bias.sub_(1)
    draw = np.random.default_rng(0)
    gradient = distil.matching_gradient(critic, teacher, (see(teacher),) * 2, given.latents[None], draw)
    assert gradient.min() > 0  # a step goes against it


def test_only_the_last_pass_of_a_sample_carries_the_gradient(contexts, monkeypatch) -> None:
    given, see = contexts
    student, asked = world(1), []
    inner = distil.guess

    def watched(of, context, noisy, sigma, grad=False):
        asked.append((round(float(sigma.flatten()[0]), 4), grad))
        return inner(of, context, noisy, sigma, grad)

    monkeypatch.setattr(distil, "guess", watched)
    levels = distil.sampler_sigmas(CONFIG.sampler)
    x0, final = distil.sample(student, see(student), levels, 2, given.latents.shape)
    assert asked == [(1.0, False), (0.9375, False), (0.8333, True), (0.625, False)]
    assert not final.requires_grad
    x0.square().mean().backward()
    silent = [name for name, p in student.dit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # the embedded prompt is part of the context, which carries none
    assert silent == [f"text_embedding.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]


def test_a_step_changes_student_and_critic_and_not_the_teacher() -> None:
    teacher = world(0).requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    work = distil.Distillation(teacher, CONFIG)
    given, draw = batch(), np.random.default_rng(0)
    made = work.step(given, given.latents, 1e-3, 3, draw, anchored=True)
    assert set(made.measures) == {"gradient", "critic", "anchor"} and all(map(np.isfinite, made.measures.values()))
    assert made.sample.shape == made.redrawn.shape == given.latents.shape
    assert not made.sample.requires_grad and not made.redrawn.requires_grad
    assert all(torch.equal(before[name], now) for name, now in teacher.state_dict().items())
    name = "dit.blocks.0.ffn.0.weight"
    student, critic = work.student.world.state_dict()[name], work.critic.world.state_dict()[name]
    assert not torch.equal(student, before[name]) and not torch.equal(critic, before[name])
    assert work.critic.step == distil.CRITIC_STEPS and work.student.step == 1


def test_a_context_turns_into_samples_chunk_by_chunk() -> None:
    """Truth is 0, the first samples are 1, the next 2: every chunk but the sink ends with a sample, its neighbours
    with one made a turn earlier or later."""
    latents = torch.zeros(1, 6, 1, 1, 1, 1)
    turns = []
    for turn in range(3):
        latents = distil.continued(latents, torch.full_like(latents, turn + 1), 1 + turn)
        turns.append(latents.flatten().int().tolist())
    assert turns == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 1, 2, 1], [0, 3, 2, 3, 2, 3]]
