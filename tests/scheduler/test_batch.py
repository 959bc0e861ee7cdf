"""Sessions in lock-step see what they see alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cfengine.config import MemoryConfig, with_policy
from cfengine.errors import CFEngineError, ConfigError, PromptError
from cfengine.scheduler.batch import per_session
from cfengine.session import Batch, Session

pytestmark = pytest.mark.cpu

PROMPTS, SEEDS = ("a b", "c", "d e f g"), (4, 5, 6)
# float32; products over more rows may sum in another order, over four passes and two blocks
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def batched(engine, lane_of) -> Batch:
    """A batch on the lane of a GPU."""
    ops = dataclasses.replace(engine.ops, cross_attention=per_session(engine.ops))
    lane, _ = lane_of(engine, len(PROMPTS), engine._make_scheduler(ops))
    make = zip(PROMPTS, SEEDS, range(len(PROMPTS)), strict=True)
    return Batch([Session(engine.config, lane, engine._prompts, p, s, place=i) for p, s, i in make], lane)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("policy", ["slow_fast", "slow_fast_paper", "sink_window"])
def test_a_batch_equals_single_sessions(toy_engine, lane_of, policy, where):
    engine = toy_engine(memory=with_policy(MemoryConfig(slow=3), policy))
    together = engine.batch(PROMPTS, seeds=SEEDS) if where == "host" else batched(engine, lane_of)
    alone = [engine.session(prompt, seed=seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    with together as batch:
        for number in range(6):
            if number == 3:
                batch.sessions[1].set_prompt("x y z")
                alone[1].set_prompt("x y z")
            for session, single, frames in zip(batch.sessions, alone, batch.next_chunk(), strict=True):
                expected = single.next_chunk()
                torch.testing.assert_close(session.latents, single.latents, **CLOSE)
                assert [frame.index for frame in frames] == [frame.index for frame in expected]
                assert all(
                    np.abs(one.pixels.astype(int) - two.pixels).max() <= 1  # where a value sits on a rounding edge
                    for one, two in zip(frames, expected, strict=True)
                )
                assert frames[0].timings.memory == expected[0].timings.memory


def test_members_move_together(toy_engine):
    engine = toy_engine()
    batch = engine.batch(["a", "b"])
    assert [session.seed for session in batch.sessions] == [0, 1] and len(engine._sessions) == 2
    with pytest.raises(ConfigError, match="1 session asks for a chunk.*batch of 2"):
        batch.sessions[0].next_chunk()
    assert all(session.closed for session in batch.sessions) and not engine._sessions
    with pytest.raises(CFEngineError, match="session is closed"):
        batch.next_chunk()


def test_bad_batches(toy_engine):
    engine = toy_engine()
    for prompts, seeds in (([], None), (["a"], [1, 2]), (["a", "b"], [1])):
        with pytest.raises(ConfigError, match=f"{len(prompts)} prompts"):
            engine.batch(prompts, seeds=seeds)
    with pytest.raises(ConfigError, match="seed is -1"):
        engine.batch(["a"], seeds=[-1])
    with pytest.raises(PromptError):
        engine.batch(["a", " "])
    assert not engine._sessions
