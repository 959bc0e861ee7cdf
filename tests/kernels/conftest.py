"""What the kernel tests share: every instruction set that this machine runs, and the measure of an error."""

from __future__ import annotations

import pytest
import torch

try:
    from cfengine import _C

    LEVELS = _C.isas()
except ImportError:
    _C, LEVELS = None, [None]


@pytest.fixture(params=LEVELS)
def isa(request):
    """Run a test once per instruction set; without the compiled extension, skip it."""
    if _C is None:
        pytest.skip("cfengine._C is not built: pip install -e . with a C++ compiler and cmake present")
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def widened(operands):
    """Copy operands, floating-point ones as float64."""
    return tuple(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in operands)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error over the largest expected value; infinite where anything is not finite."""
    worst = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float(worst) if torch.isfinite(found).all() else float("inf")


@pytest.fixture
def measure():
    return error


@pytest.fixture
def widen():
    return widened
