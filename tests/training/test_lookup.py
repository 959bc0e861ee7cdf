"""What attention is taught, by hand; that gradients reach queries and keys; that the stage goes on where it stopped."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.training import lookup
from cfengine.training.data import COLUMNS, VIEW, Batch, Strips, draw_batch, latent_yaws, shuttle
from cfengine.training.forward import Pages
from cfengine.training.seen import seen_columns, shown_columns
from cfengine.training.state import World

pytestmark = pytest.mark.cpu

CONFIG = EngineConfig(
    name="small",
    model=ModelConfig(patch=(1, 4, 1), dim=24, ffn_dim=48, heads=4, layers=4, text_dim=8, text_len=6, freq_dim=16),
    memory=MemoryConfig(policy="slow_fast_paper", threshold=2.0),
    video=VideoConfig(width=96, height=64),
)


def strips(scenes: int = 3) -> Strips:
    torch.manual_seed(3)
    latents = torch.randn(scenes, 2, COLUMNS, 8, 16)
    return Strips(latents, torch.tensor([3, 6, 9]).expand(scenes, 2, 3).clone())


def test_columns_that_return() -> None:
    """Right by a chunk, right again, back: the third chunk's first columns were seen by the first, not the second."""
    yaws = torch.from_numpy(latent_yaws(np.asarray([[24, 24, -24, -24]]), 58)).unflatten(1, (4, 3))
    columns, returning = seen_columns(yaws)
    assert columns[0, 0, 0].tolist() == [58, 59, *range(10)]
    assert not returning[0, :2].any()  # 61..63, all new or seen a chunk ago
    # chunk 2 looks at 62, 61, 60 (mod 60); chunk 1 began at 61
    assert returning[0, 2].sum(-1).tolist() == [0, 0, 1] and returning[0, 2, 2, 0] == 1
    # chunk 3 looks at 59, 58, 57; chunk 2 began at 60; 57 was never seen
    assert returning[0, 3].tolist() == [[1] + [0] * 11, [1, 1] + [0] * 10, [0, 1, 1] + [0] * 9]


def test_loss_of_attention_by_hand() -> None:
    """Two chunks of one frame: the second's first column is what column 4 of the one page shows."""
    columns = torch.stack([torch.arange(VIEW), torch.arange(4, 4 + VIEW)]).view(1, 2, 1, VIEW)
    returning = torch.zeros_like(columns, dtype=torch.float32)
    returning[0, 1, 0, 0] = 1
    ids = torch.tensor([[[0], [0]]])
    hidden = torch.zeros(2, 1, 1, 2 * VIEW, dtype=torch.bool)
    pages = Pages(torch.empty(0), torch.empty(0), hidden, ids)
    weight = torch.full((2, 2, 1, 2 * VIEW, 2 * VIEW), 1 / 40)
    weight[1, 1, 0, 0, 4] = 0.5  # one head, row 0: right
    weight[1, 1, 0, VIEW, VIEW + 4] = 1.0  # row 1: right
    expected = -np.log(np.asarray([1 / 40, 0.5, 1 / 40, 1.0]) + 1e-4).mean()
    taught = lookup.Lookup(columns, returning, rows=2)
    assert taught.loss(weight, pages).item() == pytest.approx(expected, rel=1e-5)
    pages.hidden[1] = True  # a page that is not there cannot be attended to: nothing is taught
    assert taught.loss(weight, pages).item() == 0


def test_attention_learns_from_its_loss_alone() -> None:
    world, draw = World(CONFIG.model), np.random.default_rng(0)
    batch = draw_batch(strips(), 2, 8, draw, shuttles=1.0)
    losses, made = lookup.lookup_step(world, copy.deepcopy(world), CONFIG, batch, batch.latents, draw, 0)
    assert made.shape == batch.latents.shape and not made.requires_grad
    losses["attention"].backward()
    taught = world.dit.blocks[lookup.BLOCKS[0]].self_attn
    assert taught.q.weight.grad.abs().max() > 0 and taught.k.weight.grad.abs().max() > 0
    assert taught.o.weight.grad is None or taught.o.weight.grad.abs().max() > 0  # through the blocks that follow
    last = world.dit.blocks[3].ffn[0].weight.grad
    assert last is None or last.abs().max() == 0  # nothing that is taught comes after it


def test_what_pages_show_is_known() -> None:
    """Four chunks of one frame at columns 0, 6, 12 and 3; chunk 3 sees frames 0 and 2 of them, slot 1 is empty."""
    yaws = torch.tensor([0, 6, 12, 3]).view(1, 4, 1)
    columns, _ = seen_columns(yaws)
    ids = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 2]])[None]
    hidden = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0]]).bool()
    pages = Pages(torch.empty(0), torch.empty(0), hidden.repeat_interleave(2, -1)[:, None, None], ids)
    shown = shown_columns(columns, pages)[0, :, 0]
    assert shown[0].sum() == 0
    assert shown[1].tolist() == [1] * (VIEW - 6) + [0] * 6
    assert shown[3].tolist() == [1.0] * VIEW, "0 to 11 and 12 to 23 hold 3 to 14"
    cut = Pages(pages.keys, pages.values, pages.hidden[3:], ids[:, 3:])
    assert torch.equal(shown_columns(columns, cut, 3)[0, 0, 0], shown[3])


def test_what_does_not_return_is_held_to_what_the_teacher_knew() -> None:
    """Where nothing is seen again, a copy of the teacher has nothing to learn, and another world has."""
    world, draw = World(CONFIG.model), np.random.default_rng(0)
    torch.nn.init.normal_(world.dit.head.head.weight, std=0.2)  # a new world predicts zero
    batch = draw_batch(strips(), 2, 3, draw)
    assert seen_columns(batch.yaws)[1].sum() == 0
    losses = []
    for known in (copy.deepcopy(world), World(CONFIG.model)):
        found, _ = lookup.lookup_step(world, known, CONFIG, batch, batch.latents, np.random.default_rng(1), 0)
        losses.append(found["flow"].item())
    assert losses[0] < 1e-3 < losses[1]  # bfloat16 products of two ways of calling: 2^-8 of values near 1, squared


def test_what_is_new_when_memory_is_full_is_learned_from_the_truth_in_the_end() -> None:
    """A straight pan of 12 chunks, in which nothing returns: only chunks 10 and 11 have something to learn, late."""
    world = World(CONFIG.model)
    torch.nn.init.normal_(world.dit.head.head.weight, std=0.2)
    given = draw_batch(strips(), 1, 12, np.random.default_rng(0))
    batch = given._replace(yaws=torch.arange(36).view(1, 12, 3))
    for chunks, late, learns in ((12, 0, False), (12, 1, True), (lookup.FULL, 1, False)):
        part = Batch(batch.latents[:, :chunks], batch.prompts[:, :chunks], batch.yaws[:, :chunks])
        draw = np.random.default_rng(1)
        found, _ = lookup.lookup_step(world, copy.deepcopy(world), CONFIG, part, part.latents, draw, late)
        assert (found["flow"] > 1e-3) == learns  # see above for the size


def test_a_camera_jumps_after_the_first_chunk() -> None:
    still, moved = (draw_batch(strips(), 8, 4, np.random.default_rng(3), jumps=share) for share in (0.0, 1.0))
    away = moved.yaws - still.yaws
    assert (away[:, 0] == 0).all() and (away[:, 1:] == away[:, 1:2, :1]).all()
    assert away[:, 1, 0].min() >= 0 and away[:, 1, 0].max() < COLUMNS and len(away[:, 1, 0].unique()) > 3


def test_a_shuttle_stays_near_and_turns() -> None:
    draw = np.random.default_rng(1)
    for _ in range(50):
        rates = shuttle(28, draw)
        places = np.cumsum(rates) // 24
        assert len(rates) == 28 and set(rates) <= {-24, 0, 24}
        assert places.max() - min(0, places.min()) <= 9 and -24 in rates and 24 in rates


def test_the_stage_goes_on_where_it_stopped(tmp_path) -> None:
    said: list[dict] = []
    torch.manual_seed(0)
    first = World(CONFIG.model)
    for steps in (2, 4):
        lookup.train_lookup(
            tmp_path / "l.state", first, CONFIG, strips(), 0, steps, lambda stage, values: said.append(values)
        )
        kept = torch.load(tmp_path / "l.state", weights_only=True)
        assert kept["step"] >= steps
