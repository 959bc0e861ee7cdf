"""Schedule against recorded values, x0 and re-noising against their formulas, noise against its promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cfengine.config import SamplerConfig
from cfengine.errors import ConfigError, PromptError
from cfengine.kernels.flow_to_x0.reference import flow_to_x0
from cfengine.kernels.renoise.reference import renoise
from cfengine.scheduler.sampler import Schedule, chunk_noise, counter_noise
from cfengine.scheduler.scenes import Scene, parse_scenes

pytestmark = pytest.mark.cpu
RECORDED = json.loads((Path(__file__).parents[1] / "data/schedule/schedule.json").read_text())


@pytest.mark.parametrize("shift", [3, 5, 8])
def test_schedule_equals_the_recorded_one(shift):
    schedule, recorded = Schedule(SamplerConfig(shift=float(shift))), RECORDED[f"shift_{shift}"]
    # float32 arithmetic in another order: one unit in the last place
    torch.testing.assert_close(schedule.sigmas, torch.tensor(recorded["sigmas"]), rtol=2e-7, atol=0)
    torch.testing.assert_close(schedule.timesteps, torch.tensor(recorded["timesteps"]), rtol=2e-7, atol=0)
    assert schedule.warped == pytest.approx([recorded["warped"][str(s)] for s in (1000, 750, 500, 250)], rel=2e-7)
    for step, timestep in zip((1000, 750, 500, 250), schedule.warped, strict=True):
        assert schedule.sigma(timestep) == pytest.approx(recorded["sigma_of_warped"][str(step)], rel=2e-7)
    assert schedule.sigma(0.0) == pytest.approx(recorded["context_pass"]["sigma_used"], rel=2e-7)


def test_steps_outside_the_schedule_are_refused():
    with pytest.raises(ConfigError, match="1200"):
        Schedule(SamplerConfig(steps=(1200, 500)))


def test_x0_undoes_renoise():
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x = renoise(x0, noise, 0.625)
    torch.testing.assert_close(flow_to_x0(x, noise - x0, 0.625), x0, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_noise_depends_on_place_alone():
    whole = chunk_noise(7, 0, 6, 0, (16, 4, 5))
    assert torch.equal(whole[3:], chunk_noise(7, 3, 3, 0, (16, 4, 5)))
    others = [
        counter_noise(*key, (16, 4, 5)) for key in ((7, 0, 0), (7, 0, 1), (7, 1, 0), (8, 0, 0), (2**64 - 1, 0, 0))
    ]
    for i, one in enumerate(others):
        assert not any(torch.equal(one, other) for other in others[i + 1 :])


def test_noise_is_what_it_was():
    """Videos are reproducible across versions: these are the values of the first release."""
    expected = [0.7907435894012451, -0.002758113667368889, 0.33282268047332764, -1.3306376934051514]
    assert counter_noise(7, 3, 1, (4,)).tolist() == expected
    assert torch.equal(counter_noise(np.int64(7), 3, 1, (4,)), counter_noise(7, 3, 1, (4,)))


def test_noise_is_standard_normal():
    noise = chunk_noise(3, 0, 32, 2, (16, 16, 16)).flatten()
    # 131,072 samples: standard errors are 0.0028 of the mean and 0.002 of the deviation; six of them
    assert abs(noise.mean()) < 0.017 and abs(noise.std() - 1) < 0.012
    frames = chunk_noise(3, 0, 2, 0, (16, 32, 32)).flatten(1)
    assert abs(torch.corrcoef(frames)[0, 1]) < 0.05  # 16,384 samples: six standard errors of 0.0078


def test_scenes():
    assert parse_scenes("a cat") == [Scene("a cat", 14, False)]
    parsed = parse_scenes("a cat[3s] | a dog [2.5s#] | a bird")
    assert parsed == [Scene("a cat", 4, False), Scene("a dog", 3, False), Scene("a bird", 14, True)]
    assert parse_scenes("x[0.1s]|y")[0].chunks == 1
    with pytest.raises(PromptError, match="scene 2"):
        parse_scenes("a | [2s] | c")
