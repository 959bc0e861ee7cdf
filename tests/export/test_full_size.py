"""A block of the full-size model at 832x480: one export, and ONNX Runtime's results against torch's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cfengine.config import preset
from cfengine.export.check import TOLERANCE, relative
from cfengine.export.folder import export
from cfengine.model.dit import CausalDiT, CrossCache
from cfengine.ops import select
from cfengine.segments.onnx import onnx_segments
from cfengine.segments.torch import TorchSegments

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@torch.inference_mode()
def test_a_block_of_full_size_runs_as_in_torch(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    config = preset("context-forcing")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=2))
    sizes, tokens = config.model, config.memory.chunk_frames * config.page_tokens
    torch.manual_seed(0)
    model = CausalDiT(sizes).prepare()
    manifest = export(config, model, tmp_path / "full", graphs=("middle",))
    ops, modulation = select("cpu"), model.modulate(600.0)
    heads = sizes.heads, sizes.head_dim
    cross = CrossCache(torch.randn(21, *heads), torch.randn(21, *heads), torch.zeros(21))
    x, attended = torch.randn(tokens, sizes.dim), torch.randn(tokens, *heads)
    found = onnx_segments(manifest, ops).middle(0, x, attended, modulation, cross)
    wanted = TorchSegments(model, ops, config.grid).middle(0, x, attended, modulation, cross)
    for got, want in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        assert relative(got, want) <= TOLERANCE["fp32"]
