"""Recorded traces through the kernels of a GPU, model and pages on it: in float32, and in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cfengine import ops
from cfengine.errors import KernelError
from cfengine.testing import replay

DATA = Path(__file__).resolve().parents[1] / "data"
pytestmark = pytest.mark.gpu


def replayed(name: str, impl: str, dtype: torch.dtype):
    """Report of a trace, served by an implementation wherever there is one of that name."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton", reason="pip install triton")
    try:
        chosen = ops.select("cuda", prefer=impl)
    except KernelError as error:
        pytest.skip(str(error))
    assert impl in chosen.names.values()
    return replay.replay(DATA / f"{name}.safetensors", chosen, "cuda", dtype)


@pytest.mark.parametrize("name", ["memory_head64", "memory_head128", "dit_cf_roll", "dit_longlive"])
def test_traces_replay(name):
    report = replayed(name, "triton", torch.float32)
    assert not report.failed, (report.mismatches[:5], report.worst)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["cuda", "triton", "sdpa", "reference"])
@pytest.mark.parametrize("name", ["memory_head64", "memory_head128"])
def test_traces_replay_in_16_bits(name, impl, dtype):
    """Head sizes that every implementation of attention serves itself."""
    report = replayed(name, impl, dtype)
    assert not report.failed, (report.mismatches[:5], report.worst)
