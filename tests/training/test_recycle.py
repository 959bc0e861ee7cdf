"""The bank of errors: what enters it, what a context carries of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cfengine.training.recycle import SIZE, ErrorBank, corrupt

pytestmark = pytest.mark.cpu

SHAPE = (2, 4, 3, 2, 2, 2)  # sessions, chunks, frames, channels, rows, columns


def filled(share: float) -> tuple[ErrorBank, torch.Tensor]:
    """A bank of eight residuals, the numbers 1 to 8."""
    bank = ErrorBank(share)
    truth = torch.zeros(SHAPE)
    made = truth + torch.arange(1.0, 9).view(2, 4, 1, 1, 1, 1)
    bank.add(truth, truth, made, np.random.default_rng(0))
    return bank, truth


def test_only_what_was_made_anew_enters() -> None:
    bank, truth = ErrorBank(1.0), torch.randn(SHAPE)
    made = truth.clone()
    made[1, 2] += 0.5
    bank.add(truth, truth, made, np.random.default_rng(0))
    assert bank.errors.shape == (1, *SHAPE[2:])
    torch.testing.assert_close(bank.errors.float(), torch.full((1, *SHAPE[2:]), 0.5), atol=1e-3, rtol=0)  # float16


def test_a_full_bank_keeps_its_size_and_takes_what_is_new() -> None:
    bank, truth = filled(1.0)
    draw = np.random.default_rng(1)
    for number in range(9, 50):
        bank.add(truth, truth, truth + number, draw)
    assert len(bank.errors) == SIZE and (bank.errors == 49).flatten(1).all(1).sum() == 8
    assert len(bank.errors.flatten(1)[:, 0].unique()) > 20, "old residuals go at random, not all at once"


def test_residuals_reach_the_chosen_chunks() -> None:
    bank, truth = filled(0.5)
    spoilt = bank.spoil(truth.repeat(100, 1, 1, 1, 1, 1), np.random.default_rng(2))
    values = spoilt.flatten(2)
    assert (values == values[..., :1]).all(), "a residual belongs to a whole chunk"
    assert set(values[..., 0].unique().tolist()) == set(map(float, range(9)))
    assert 0.42 < (values[..., 0] != 0).float().mean() < 0.58  # 800 draws of 0.5: a deviation is 0.018
    assert torch.equal(ErrorBank(1.0).spoil(truth, np.random.default_rng(0)), truth), "an empty bank has nothing to add"


def test_a_context_is_truth_what_was_made_or_spoilt() -> None:
    bank, _ = filled(1.0)
    truth = torch.zeros(SHAPE)
    draw = np.random.default_rng(3)
    contexts = torch.cat([corrupt(truth, torch.full(SHAPE, 100.0), draw, bank) for _ in range(20)])
    levels = contexts.flatten(2).mean(-1).round()  # the noise of at most 0.1 has a mean below 0.1
    assert set(levels.flatten().tolist()) == {100.0, *map(float, range(1, 9))}


def test_a_bank_goes_on_where_it_was_left(tmp_path) -> None:
    bank, truth = filled(0.5)
    bank.save(tmp_path / "dit.state")
    again = ErrorBank(0.5)
    again.resume(tmp_path / "dit.state")
    draws = [np.random.default_rng(4) for _ in range(2)]
    assert torch.equal(bank.spoil(truth, draws[0]), again.spoil(truth, draws[1]))
