"""Distribution matching: where its gradient points, and which weights it reaches."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.errors import ConfigError
from cfengine.ops import select
from cfengine.training import distil
from cfengine.training.coupling import COUPLED
from cfengine.training.data import Batch
from cfengine.training.forward import window
from cfengine.training.seen import shown_in
from cfengine.training.settings import Settings, Student
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
    return Batch(torch.randn(shape), torch.randint(12, (2, chunks, 4)), None)


@pytest.fixture
def contexts():
    given = batch()
    return given, lambda of: distil.context_of(of, CONFIG, given.latents, given.prompts)


def lowered(teacher: World, by: float) -> World:
    """The same world with a flow that is lower: it denoises to values that are higher by sigma times that."""
    made = copy.deepcopy(teacher)
    with torch.no_grad():
        made.dit.head.head.bias.sub_(by)
    return made


@pytest.mark.parametrize(
    ("critic", "blind", "sign"),
    [
        (0, 0, 0),  # equal judges leave a sample alone
        (1, 0, 1),  # a sample goes down, against the gradient, from the critic towards the teacher
        (0, 1, 1),  # and away from what the teacher makes of it without a prompt
        (0, -1, -1),
        (1, -1, 0),  # the guided teacher: as far beyond the teacher as the blind one stays behind
    ],
)
def test_where_a_sample_is_told_to_go(contexts, critic: float, blind: float, sign: int) -> None:
    given, see = contexts
    teacher = world(0)
    judges = distil.Judges(lowered(teacher, critic), teacher, lowered(teacher, blind))
    draw = np.random.default_rng(0)
    seen = distil.Judges(see(teacher), see(teacher), see(teacher))
    gradient = distil.matching_gradient(judges, seen, given.latents[None], draw, 1.0)
    if sign:
        assert (gradient * sign).min() > 0
    else:  # flows of about 1 leave a bfloat16 product: 2^-8 for each of two judges, over a size of at least a half
        assert gradient.abs().max() <= (2**-6 if critic else 0)


def test_what_the_context_shows() -> None:
    """A view of columns 0 to 16, then 20 to 33, then 4 to 17: of the last, 17 is new, and was in neither."""
    given = batch()
    yaws = torch.tensor([[[0, 2, 5], [20, 21, 22], [4, 5, 6]]] * 2)
    own = distil.context_of(world(0), CONFIG, given.latents, given.prompts)
    shown = shown_in(own, yaws)
    assert shown[0].sum((1, 2)).tolist() == [0, 0, 35]
    assert shown[0, 2].min(-1).values.tolist() == [1, 1, 0]  # column 17 stands at the edge of the last frame
    held = torch.tensor([[[0, 0, 0], [1, 1, 1], [2, 2, 2]]] * 2)  # nearly all was in the chunk before
    assert shown_in(own, held)[0, 1].sum() == 33
    part = shown_in(window(own, 2, 1), yaws, 2)
    assert part[0].sum() == 35 and part.shape == (2, 1, 3, 12)
    assert torch.equal(shown_in(window(own, 1, 1), yaws, 1), shown[:, 1:2])
    assert shown_in(own, None) is None


def test_only_the_last_pass_of_a_sample_carries_the_gradient(contexts, monkeypatch) -> None:
    given, see = contexts
    student, asked = world(1), []
    inner = distil.guess

    def watched(of, context, noisy, sigma, grad=False):
        asked.append((round(float(sigma.flatten()[0]), 4), grad))
        return inner(of, context, noisy, sigma, grad)

    monkeypatch.setattr(distil, "guess", watched)
    levels = distil.sampler_sigmas(CONFIG.sampler)
    x0, final = distil.walk(student, see(student), torch.randn(1, *given.latents.shape), levels.tolist(), 2)
    assert asked == [(1.0, False), (0.9375, False), (0.8333, True), (0.625, False)]
    assert not final.requires_grad
    x0.square().mean().backward()
    silent = [name for name, p in student.dit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # the embedded prompt is part of the context, which carries none
    assert silent == [f"text_embedding.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]


def test_a_step_changes_student_and_critic_and_not_the_teacher() -> None:
    teacher = world(0).requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    work = distil.Distillation(teacher, CONFIG, Student(peak=1e-3, warm=1))
    given, draw = batch(), np.random.default_rng(0)
    made = work.step(given, given.latents, 3, draw, anchored=True)
    assert set(made.measures) == {"gradient", "critic", "anchor"} and all(map(np.isfinite, made.measures.values()))
    assert made.sample.shape == made.redrawn.shape == given.latents.shape
    assert not made.sample.requires_grad and not made.redrawn.requires_grad
    assert all(torch.equal(before[name], now) for name, now in teacher.state_dict().items())
    name = "dit.blocks.0.ffn.0.weight"
    student, critic = work.student.world.state_dict()[name], work.critic.world.state_dict()[name]
    assert not torch.equal(student, before[name]) and not torch.equal(critic, before[name])
    assert work.critic.step == 5 and work.student.step == 1


def test_what_the_context_shows_is_held_to_the_truth() -> None:
    """Chunks at one place show what the one before showed; at places apart nothing but the last pass is held."""
    config = dataclasses.replace(CONFIG, video=VideoConfig(width=96, height=32))
    teacher = world(0).requires_grad_(False)
    work = distil.Distillation(teacher, config, Student())
    shape, prompts = (1, 3, 3, 16, 4, 12), torch.randint(12, (1, 3, 4))
    for move, known in ((0, True), (20, False)):
        yaws = (move * torch.arange(3)).view(1, 3, 1).expand(1, 3, 3)
        given = Batch(torch.randn(shape), prompts, yaws)
        own, *_ = work.contexts(given.latents, prompts)
        shown = shown_in(own, yaws)
        assert shown[0, 0].sum() == 0 and (shown[0, 1:].mean() == 1) == known
        assert work.step(given, given.latents, 3, np.random.default_rng(0), anchored=True).measures["held"] >= 0
        last, held = distil.redrawn(work.student.world, work.levels, own, given, shown, np.random.default_rng(0))
        assert last.requires_grad and (held > 0) == known


def test_what_coupled_noise_says_is_held_to_the_truth() -> None:
    """A first chunk, of which no context shows anything: a pass of much noise is held all the same, others are not."""
    shape = (2, 1, 3, 16, 8, 12)
    marks = torch.tensor([[[4, 0, 0]] + [[-1, -1, -1]] * 7]).expand(2, -1, -1)
    given = Batch(torch.randn(shape), torch.randint(12, (2, 1, 4)), torch.zeros(2, 1, 3, dtype=torch.long), marks)
    config = dataclasses.replace(CONFIG, video=VideoConfig(width=96, height=64))
    work = distil.Distillation(world(0).requires_grad_(False), config, Student())
    own, *_ = work.contexts(given.latents, given.prompts)
    for pick, said in ((0, True), (1, True), (2, False)):
        draw = np.random.default_rng(0)
        levels = work.levels[[pick, 3]]  # the only earlier pass is this one
        _, held = distil.redrawn(work.student.world, levels, own, given, torch.zeros(2, 1, 3, 12), draw)
        _, known = distil.redrawn(
            work.student.world, levels, own, given._replace(landmarks=None), torch.zeros(2, 1, 3, 12), draw
        )
        assert (held > 0) == said and known == 0


def test_passes_that_read_noise_keep_to_the_teacher() -> None:
    """They learn from nothing but its answer; the critic learns of the passes that judges are asked about."""
    shape, still = (2, 1, 3, 16, 8, 12), torch.zeros(2, 1, 3, dtype=torch.long)
    marks = torch.full((2, 8, 3), -1)
    given = Batch(torch.randn(shape), torch.randint(12, (2, 1, 4)), still, marks)
    config = dataclasses.replace(CONFIG, video=VideoConfig(width=96, height=64))
    teacher = world(0).requires_grad_(False)
    for place, reads in enumerate((True, True, False, False)):
        work = distil.Distillation(teacher, config, Student(peak=1e-3, warm=1))
        work.student.world.load_state_dict(lowered(teacher, 1).state_dict())
        bias = work.student.world.dit.head.head.bias
        before = bias.detach().clone()
        made = work.step(given, given.latents, place, np.random.default_rng(0), anchored=False)
        assert set(made.measures) == ({"drift"} if reads else {"gradient", "critic"})
        assert work.critic.step == (0 if reads else Student().critic_steps)
        if reads:  # a flow that is lower by 1 is off by the noise level
            assert made.measures["drift"] == pytest.approx(work.levels[place].item() ** 2, rel=0.02)  # bfloat16
            assert (bias > before).all(), "up again"
    # In a view that moves, what enters unseen counts 16 times. The flow is lower by 1 everywhere; of the 72
    # columns of two chunks 3 + 2 + 1 in each are new to it, but for the first of the three chunks.
    work = distil.Distillation(teacher, config, Student(window=2))
    work.student.world.load_state_dict(lowered(teacher, 1).state_dict())
    yaws = torch.arange(9).view(1, 3, 3).expand(2, -1, -1)
    moving = Batch(torch.randn(2, 3, 3, 16, 8, 12), torch.randint(12, (2, 3, 4)), yaws, marks)
    for seed in range(4):
        made = work.step(moving, moving.latents, 0, np.random.default_rng(seed), anchored=False)
        assert min(abs(72 * made.measures["drift"] - 72 - 15 * seen) for seen in (6, 12)) < 2  # bfloat16
    free = distil.Distillation(teacher, config, Student())
    made = free.step(given._replace(landmarks=None), given.latents, 0, np.random.default_rng(0), anchored=False)
    assert set(made.measures) == {"gradient", "critic"}, "noise that says nothing leaves a choice"


def test_judges_are_asked_where_noise_knows_nothing() -> None:
    draw = np.random.default_rng(0)
    sigma = torch.cat([distil.noised(torch.zeros(1, 8, 4, 1, 1, 1, 1), draw, distil.JUDGED)[1] for _ in range(20)])
    assert sigma.max() == pytest.approx(distil.JUDGED) and sigma.min() < 0.3
    assert distil.noised(torch.zeros(1, 64, 4, 1, 1, 1, 1), draw)[1].max() > COUPLED


def test_a_window_sees_what_all_of_a_rollout_shows_it() -> None:
    teacher, given, draw = world(0).requires_grad_(False), batch(5), np.random.default_rng(0)
    whole = distil.context_of(teacher, CONFIG, given.latents, given.prompts)
    part = distil.window(whole, 2, 2)
    noisy, sigma = torch.randn(1, *given.latents.shape), torch.full((1, 2, 5), 0.9)
    flow, cut = (
        distil.guess(teacher, whole, noisy, sigma),
        distil.guess(teacher, part, noisy[:, :, 2:4], sigma[:, :, 2:4]),
    )
    # bfloat16 products of other shapes: values up to 4, of which the last bit is 2^-6
    torch.testing.assert_close(cut, flow[:, :, 2:4], atol=2**-4, rtol=0)
    work = distil.Distillation(teacher, CONFIG, Student(window=2))
    places = [work.judged(5, draw) for _ in range(100)]
    assert {count for _, count in places} == {2} and {first for first, _ in places} == {0, 1, 2, 3}
    assert work.judged(1, draw) == (0, 1)
    made = work.step(given, given.latents, 3, draw, anchored=True)
    assert made.sample.shape[1] == 2 and (made.redrawn != given.latents).flatten(2).any(-1).sum() == 2 * 2


def test_judges_can_have_a_memory_of_their_own() -> None:
    """A teacher that sees the chunk before alone: in its context no later chunk sees the first."""
    teacher, given = world(0).requires_grad_(False), batch(5)
    short = {"policy": "fifo", "sink": 0, "slow": 0, "fast": 6}
    work = distil.Distillation(teacher, CONFIG, Student(judges=short, guidance=1.0))
    own, (critic, judge, blind) = work.contexts(given.latents, given.prompts)
    assert own.layers[0].ids.shape[-1] > 3
    for context in (critic, judge, blind):
        assert context.layers[0].ids[0].tolist()[1:] == [[3 * c, 3 * c + 1, 3 * c + 2] for c in range(4)]
    with pytest.raises(ConfigError, match="student.judges"):
        Settings(preset="tiny-world", student=Student(judges={"policy": "slow_fast"}))


def test_a_rollout_keeps_given_chunks_and_makes_the_rest() -> None:
    student, given = world(0).requires_grad_(False), batch(4)
    with torch.inference_mode():
        made = distil.roll_out(student, CONFIG, select("cpu"), given, 2, [5, 6])
        again = distil.roll_out(student, CONFIG, select("cpu"), given, 2, [5, 6])
        other = distil.roll_out(student, CONFIG, select("cpu"), given, 2, [5, 7])
    assert torch.equal(made[:, :2], given.latents[:, :2]) and made.shape == given.latents.shape
    assert torch.equal(made, again) and torch.equal(made[0], other[0]) and not torch.equal(made[1], other[1])
    assert not torch.isclose(made[:, 2:], given.latents[:, 2:]).any(dim=(3, 4, 5)).all()


def test_the_horizon_grows() -> None:
    common = np.random.default_rng(0)
    plan = Student(local=0.4, short=(2, 7), long=(8, 12, 28))
    drawn = {share: {distil.horizon(plan, share, common) for _ in range(300)} for share in (0.0, 0.39, 0.4, 1.0)}
    assert drawn[0.0] == drawn[0.39] == set(range(2, 8))
    assert drawn[0.4] == set(range(8, 13)) and drawn[1.0] == set(range(8, 29))
    often = [distil.horizon(dataclasses.replace(plan, first=0.5), 1.0, common) for _ in range(1000)]
    assert 400 < often.count(1) < 600 and max(often) == 28  # six standard deviations


def test_a_teacher_is_guided_by_itself_without_a_prompt() -> None:
    teacher = world(0).requires_grad_(False)
    given = batch()
    given = given._replace(prompts=torch.randn(2, 3, 4, CONFIG.model.text_dim))
    blind = distil.Distillation(teacher, CONFIG, Student(guidance=1.0))
    own, (critic, real, none) = blind.contexts(given.latents, given.prompts)
    assert torch.equal(real.prompt, critic.prompt) and torch.equal(real.prompt, own.prompt)
    empty = distil.context_of(teacher, CONFIG, given.latents, torch.zeros_like(given.prompts))
    assert torch.equal(none.prompt, empty.prompt) and not torch.equal(none.prompt, real.prompt)
    assert blind.judges.blind is teacher and distil.Distillation(teacher, CONFIG, Student()).judges.blind is None
