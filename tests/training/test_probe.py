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
from cfengine.training.data import build_strips
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
