"""What attention is taught, by hand; that gradients reach queries and keys; that the stage goes on where it stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.training import data, lookup
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
    columns, entering, returning = seen_columns(yaws)
    assert not entering[0, 0].any() and entering[0, 1].sum(-1).tolist() == [1, 2, 3]
    assert columns[0, 0, 0].tolist() == [58, 59, *range(10)]
    assert not returning[0, :2].any()  # 61..63, all new or seen a chunk ago
    # chunk 2 looks at 62, 61, 60 (mod 60); chunk 1 began at 61
    assert returning[0, 2].sum(-1).tolist() == [0, 0, 1] and returning[0, 2, 2, 0] == 1
    # chunk 3 looks at 59, 58, 57; chunk 2 began at 60; 57 was never seen
    assert returning[0, 3].tolist() == [[1] + [0] * 11, [1, 1] + [0] * 10, [0, 1, 1] + [0] * 9]


def test_loss_of_attention_by_hand() -> None:
    """Two chunks of one frame: column 4 of the one page shows the second's first column; its last four are new."""
    columns = torch.stack([torch.arange(VIEW), torch.arange(4, 4 + VIEW)]).view(1, 2, 1, VIEW)
    returning = torch.zeros_like(columns, dtype=torch.float32)
    returning[0, 1, 0, 0] = 1
    ids = torch.tensor([[[0], [0]]])
    hidden = torch.zeros(2, 1, 1, 2 * VIEW, dtype=torch.bool)
    pages = Pages(torch.empty(0), torch.empty(0), hidden, ids)
    weight = torch.full((2, 2, 1, 2 * VIEW, 2 * VIEW), 1 / 40)
    weight[1, 1, 0, 0, 4] = 0.5  # one head, row 0: right
    weight[1, 1, 0, VIEW, VIEW + 4] = 1.0  # row 1: right
    nowhere = [1 - 2 * VIEW / 40] * 16  # what is left for the chunk's own: two heads, two rows, four columns
    expected = -np.log(np.asarray([1 / 40, 0.5, 1 / 40, 1.0, *nowhere]) + 1e-4).mean()
    taught = lookup.Lookup(columns, returning, rows=2)
    assert taught.loss(weight, pages).item() == pytest.approx(expected, rel=1e-5)
    pages.hidden[1] = True  # a page that is not there cannot be attended to: nothing is taught
    assert taught.loss(weight, pages).item() == 0


def test_attention_learns_from_its_loss_alone() -> None:
    world, draw = World(CONFIG.model), np.random.default_rng(0)
    batch = draw_batch(strips(), 2, 8, draw, shuttles=1.0)
    losses, made = lookup.lookup_step(world, CONFIG, batch, batch.latents, draw, 0)
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
    columns = seen_columns(yaws).column
    ids = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 2]])[None]
    hidden = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0]]).bool()
    pages = Pages(torch.empty(0), torch.empty(0), hidden.repeat_interleave(2, -1)[:, None, None], ids)
    shown = shown_columns(columns, pages)[0, :, 0]
    assert shown[0].sum() == 0
    assert shown[1].tolist() == [1] * (VIEW - 6) + [0] * 6
    assert shown[3].tolist() == [1.0] * VIEW, "0 to 11 and 12 to 23 hold 3 to 14"
    cut = Pages(pages.keys, pages.values, pages.hidden[3:], ids[:, 3:])
    assert torch.equal(shown_columns(columns, cut, 3)[0, 0, 0], shown[3])


def test_what_enters_counts_more(monkeypatch) -> None:
    """A pan of three chunks by three columns each: of their 108 columns 12 enter, none of them in the first chunk."""
    world = World(CONFIG.model)
    torch.nn.init.zeros_(world.dit.head.head.weight)  # the flow of a new world, zero: its error is the target's square
    given = draw_batch(strips(), 1, 3, np.random.default_rng(0))
    batch = given._replace(yaws=torch.arange(9).view(1, 3, 3))
    _, entering, _ = seen_columns(batch.yaws)
    assert entering.sum((-1, -2)).tolist() == [[0, 6, 6]]
    said = batch._replace(landmarks=torch.full((1, 8, 3), -1))
    monkeypatch.setattr(lookup, "draw_sigmas", lambda shape, levels, draw: torch.full(shape, 0.5))
    monkeypatch.setattr(lookup, "HIGH", (1.0,))  # of one copy in two

    def error(given: Batch, more: float, new: float) -> float:
        monkeypatch.setattr(lookup, "MORE", (more, more))
        monkeypatch.setattr(lookup, "NEW", new)
        torch.manual_seed(0)
        losses, _ = lookup.lookup_step(world, CONFIG, given, batch.latents, np.random.default_rng(1), 0)
        return losses["flow"].item()

    # Latents and noise are normal. Their squares in 12 columns x 8 rows x 16 channels have a mean that is off by 0.04
    # (a standard deviation), the share of those in the sum is a tenth, or a half.
    assert error(batch, 1.0, 0.0) / error(batch, 0.0, 0.0) == pytest.approx(1 + 12 / 108, rel=0.02)
    assert error(said, 0.0, 9.0) / error(said, 0.0, 0.0) == pytest.approx(1 + 9 * 12 / 216, rel=0.06)
    assert error(batch, 0.0, 9.0) == error(batch, 0.0, 0.0), "who does not know what noise says has nothing to read"


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


def test_a_ratchet_turns_back_and_gets_ahead() -> None:
    """Never back by more than three chunks; a turn takes 11 chunks at most, so that within 28 it is twice where it was
    never before, right after it came back.
    """
    draw, gained = np.random.default_rng(1), []
    for _ in range(50):
        rates = data.ratchet(28, draw)
        assert len(rates) == 28 and set(rates) <= {-24, 0, 24} and set(data.back_and_forth(28, draw)) <= {-24, 0, 24}
        places = np.cumsum(rates) // 24 * np.sign(rates[0])
        ahead = np.maximum.accumulate(places)
        assert (ahead - places).max() <= 3
        back = places < ahead
        gained.append((back[:-2] & ~back[1:-1] & (np.diff(ahead)[1:] > 0)).sum())
    assert min(gained) >= 2


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
