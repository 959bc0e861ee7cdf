"""The batched training forward against the engine's own chunk walk."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass
from cfengine.model.dit import CausalDiT
from cfengine.ops import select
from cfengine.segments.torch import TorchSegments
from cfengine.segments.walk import walk
from cfengine.training import forward
from cfengine.training.forward import flow
from cfengine.training.seen import shown_columns
from cfengine.training.slots import page_table

pytestmark = pytest.mark.cpu

MODEL = ModelConfig(dim=48, ffn_dim=96, heads=2, layers=2, text_dim=8, text_len=6, freq_dim=16)


def small_config(**memory) -> EngineConfig:
    rule = MemoryConfig(**{"policy": "slow_fast_paper", **memory})
    rule = dataclasses.replace(rule, rope_length=9 + rule.slow)
    return EngineConfig(name="small", model=MODEL, memory=rule, video=VideoConfig(width=96, height=64))


def compare_with_engine(config: EngineConfig, chunks: int) -> int:
    """Hold the batched forward of two sessions against the engine's walk; returns how many pages were promoted."""
    torch.manual_seed(0)
    model = CausalDiT(MODEL)
    B, C = 2, chunks
    shape = (3, 16, 8, 12)
    clean = torch.randn(B, C, *shape) + 2 * torch.randn(B, C, 1, 16, 1, 1)
    noisy, text = torch.randn(1, B, C, *shape), torch.randn(B, C, 4, MODEL.text_dim)
    timestep = torch.tensor([1000.0, 625.0])[torch.arange(B * C) % 2].view(1, B, C)
    with torch.no_grad():
        batched = flow(model, config.memory, clean, noisy, timestep, text)
    model.prepare()
    ops = select("cpu", prefer="reference")
    segments = TorchSegments(model, ops, config.grid)
    promoted = 0
    for b in range(B):
        memory = Memory(config, ops, torch.float32)
        for c in range(C):
            cross = model.project_text(text[b, c])
            made = walk(segments, memory, noisy[0, b, c], Pass(3 * c), model.modulate(float(timestep[0, b, c])), cross)
            # float32 sums in another order, values near 1: 1e-4 is a hundred roundings
            torch.testing.assert_close(batched[0, b, c], made, atol=1e-4, rtol=1e-4)
            walk(segments, memory, clean[b, c], Pass(3 * c, clean=True), model.modulate(0.0), cross)
        promoted += sum(int(table.promoted) for table in memory.tables.layers)
    return promoted


@pytest.mark.parametrize(("slow", "threshold"), [(2, 2.0), (12, 0.95), (12, -2.0)])
def test_flow_equals_engine_walk(slow: int, threshold: float) -> None:
    """Thresholds: every odd chunk marked (slow memory of two rolls over), by similarity, none."""
    promoted = compare_with_engine(small_config(slow=slow, threshold=threshold), 11)
    assert (promoted > 0) == (threshold > -1), "the case does not exercise slow memory as it says"


@pytest.mark.parametrize("policy", ["fifo", "sink_window", "relative_window"])
def test_flow_under_a_window_equals_engine_walk(policy: str) -> None:
    """Windows of nine and of twelve frames, which move on from the fourth and the fifth chunk."""
    for slow in (0, 3):
        compare_with_engine(small_config(policy=policy, slow=slow), 7)


@pytest.mark.parametrize("policy", ["slow_fast_paper", "sink_window"])
def test_first_chunks_alone(policy: str, monkeypatch) -> None:
    """They equal the engine's walk, run no clean stream, and show nothing that anybody has seen."""
    config = small_config(policy=policy)
    assert compare_with_engine(config, 1) == 0
    model, projected = CausalDiT(MODEL), []
    monkeypatch.setattr(forward, "_project", lambda *given: projected.append(given))
    context = forward.remember(model, config.memory, torch.randn(2, 1, 3, 16, 8, 12), torch.randn(2, 1, 4, 8))
    assert len(context.layers) == MODEL.layers and not projected
    columns = torch.arange(12).expand(2, 1, 3, -1)
    assert shown_columns(columns, context.layers[0]).shape == columns.shape
    assert not shown_columns(columns, context.layers[0]).any()


def test_page_table_of_a_marked_sequence() -> None:
    """Seven chunks, chunk 1 and 5 novel, chunk 3 like its predecessor: by hand."""
    mean = torch.eye(8)[[0, 1, 2, 2, 3, 4, 5]][None]
    pages, valid = page_table(mean, MemoryConfig(policy="slow_fast_paper"))
    assert valid[0, 0].sum() == 0
    assert pages[0, 1][valid[0, 1]].tolist() == [0, 1, 2]
    assert pages[0, 2][valid[0, 2]].tolist() == [0, 1, 2, 3, 4, 5]
    assert pages[0, 3][valid[0, 3]].tolist() == [0, 1, 2, 6, 7, 8, 3]
    assert pages[0, 6][valid[0, 6]].tolist() == [0, 1, 2, 15, 16, 17, 3]


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    config = small_config()
    model = CausalDiT(MODEL)
    clean, noisy = torch.randn(1, 4, 3, 16, 8, 12), torch.randn(2, 1, 4, 3, 16, 8, 12)
    text = torch.randn(1, 4, 4, MODEL.text_dim, requires_grad=True)
    flow(model, config.memory, clean, noisy, torch.full((2, 1, 4), 625.0), text).square().mean().backward()
    assert text.grad.abs().sum() > 0
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
