"""Steps on meta tensors: sizes by hand, and the config of the full-size model."""

from __future__ import annotations

import pytest
import torch

from cfengine.training import dry
from cfengine.training.settings import read

pytestmark = pytest.mark.cpu

SMALL = ["model.dim=24", "model.ffn_dim=48", "model.heads=2", "model.layers=2", "student.long=[2, 2, 3]"]


def test_sizes_of_a_small_world() -> None:
    settings = read("tiny-world", [*SMALL, "teacher.lengths=[[2, 1, 1, 1], [3, 2, 1, 1]]"])
    teacher, student = dry.teacher_step(settings), dry.student_step(settings)
    assert teacher.sessions == 2 and teacher.chunks == 3
    assert teacher.tokens == 2 * 3 * 3 * 2 * 12  # sessions, chunks, latent frames, rows, columns
    assert teacher.weights == teacher.gradients == teacher.averages == 4 * teacher.parameters
    # Muon keeps one number a weight of a matrix, AdamW two and a step of 4 bytes a tensor
    assert 4 * teacher.parameters < teacher.optimiser < 8 * teacher.parameters
    assert (student.networks, student.weights) == (3, 12 * student.parameters)
    assert student.gradients == student.averages == 8 * student.parameters
    # forward and backward of what is at least 2 products a weight of a block, for clean and two noisy streams
    blocks = 2 * (8 * 24 * 24 + 2 * 24 * 48)
    assert teacher.flops > 3 * 2 * 2 * blocks * teacher.tokens and student.flops > teacher.flops / 2
    said = dry.table([teacher, student])
    assert "2 x 3 chunks, 432 tokens" in said and "Not counted: activations" in said


@pytest.mark.slow
def test_the_full_size_config_takes_a_step() -> None:
    settings = read("wan2.1-t2v-1.3b")
    teacher, student = dry.teacher_step(settings), dry.student_step(settings)
    assert teacher.parameters == student.parameters == sum(p.numel() for p in dry._world(settings).parameters())
    assert 1.3e9 < teacher.parameters < 1.5e9
    assert teacher.tokens == 34 * 3 * settings.config.page_tokens and settings.config.grid == (30, 52)
    assert student.networks == 3 and student.flops > teacher.flops > 1e15


def test_attention_in_one_call_is_the_same() -> None:
    from cfengine.training.forward import Pages, fused_attention, plain_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 2, 6, 8)  # (B C, heads, streams, T, head_dim)
    hidden = torch.rand(4, 1, 1, 10) < 0.5
    hidden[0] = True  # a chunk that sees nothing but itself
    pages = Pages(torch.randn(4, 2, 10, 8), torch.randn(4, 2, 10, 8), hidden, torch.empty(0))
    # float32 sums in another order, values near 1
    torch.testing.assert_close(fused_attention(q, k, v, pages), plain_attention(q, k, v, pages), atol=1e-5, rtol=1e-5)
