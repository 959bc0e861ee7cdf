"""Recorded traces through the kernels of a GPU, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cfengine import ops
from cfengine.testing import replay

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["memory_head64", "dit_cf_roll", "dit_longlive"])
def test_traces_replay(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton", reason="pip install triton")
    report = replay.replay(DATA / f"{name}.safetensors", ops.select("cuda", prefer="triton"), "cuda")
    assert not report.mismatches, report.mismatches[:5]
    assert report.worst[0] <= replay.TOLERANCE, report.worst
