"""What a probe says of pictures whose landmarks are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cfengine
from cfengine.codec.tiny_world import TinyWorldCodec
from cfengine.config import preset
from cfengine.training import probe
from cfengine.training.data import VIEW, Batch, build_strips
from cfengine.training.state import World

pytestmark = pytest.mark.cpu

CODEC = Path(cfengine.__file__).parent / "weights" / "tiny-world" / "codec.safetensors"


def test_the_truth_is_whole_and_noise_is_not(monkeypatch) -> None:
    config, codec, asked = preset("tiny-world"), TinyWorldCodec.from_file(CODEC), []
    strips, of = build_strips(codec, 6, 0), World(preset("tiny-world").model).requires_grad_(False)
    truth = strips.draw(24, 1, np.random.default_rng(7)).latents

    def drawn(world, context, x, levels):
        asked.append((len(levels), levels[0], levels[-1]))
        return None, truth[None]

    with monkeypatch.context() as patch:
        patch.setattr(probe, "walk", drawn)
        made = probe.probe(of, config, strips, codec, 24, 10)
    assert asked == [(10, 1.0, pytest.approx(0.1 * 5 / (0.9 + 0.1 * 5)))]
    assert made.landmarks > 0.5 and made.whole > 0.9 and sum(made.shapes.values()) == pytest.approx(1)
    assert sum(share > 0 for share in made.shapes.values()) > 2
    with torch.no_grad():
        none = probe.probe(of, config, strips, codec, 24, 2)  # a new network predicts no flow: noise stays
    assert none.whole < 0.1


def test_which_columns_are_of_landmarks_that_enter() -> None:
    """A cone in columns 14 to 17, a tower in 56 and 57; a camera pans right by three columns, another left."""
    marks = torch.tensor([[16, 1, 0], [57, 0, 2]] + [[-1, -1, -1]] * 6)
    assert [probe.world.SHAPES[shape] for shape in (0, 1)] == ["tower", "cone"]
    yaws = torch.tensor([[[0, 0, 0], [1, 2, 3]], [[0, 0, 0], [-1, -2, -3]]]) % 60
    batch = Batch(
        torch.zeros(2, 2, 3, 16, 8, VIEW), torch.zeros(2, 2, 4, dtype=torch.long), yaws, marks.expand(2, -1, -1)
    )
    new = probe.seen_columns(yaws).entering > 0
    found = probe.entering_landmarks(batch, new)
    assert not found[:, 0].any()
    assert found[0, 1].nonzero().tolist() == [[2, 11]], "of columns 12 to 14 the last"
    assert found[1, 1].nonzero().tolist() == [[2, 0]], "of columns 59 to 57 the last, as far as it has come"


def test_what_is_read_in_noise(monkeypatch) -> None:
    """A new network sees no difference; what it is asked about is the same noise with and without what it says."""
    config, codec = preset("tiny-world"), TinyWorldCodec.from_file(CODEC)
    strips, of = build_strips(codec, 6, 0), World(preset("tiny-world").model).requires_grad_(False)
    said, unsaid = probe.reading(of, config, strips, 8, 6)
    assert said > 1 and said == pytest.approx(unsaid, rel=0.1)  # ten of a column's 128 numbers are others
    noises = []

    def watched(world, context, noisy, level):
        noises.append(noisy)  # nothing else, at the level of 1
        return torch.zeros_like(noisy)

    monkeypatch.setattr(probe, "guess", watched)
    probe.reading(of, config, strips, 8, 6)
    said, unsaid = noises
    others = (said != unsaid).flatten(0, 3).any(0)  # channels, rows, columns
    assert others[:10, 4].any() and not others[10:].any() and not others[:, :4].any(), "noise that says something"
