"""The choice of an instruction set."""

from __future__ import annotations

import pytest

from cfengine.errors import KernelError

pytestmark = pytest.mark.cpu
_C = pytest.importorskip("cfengine._C", reason="pip install -e . with a C++ compiler and cmake present")


def test_best_is_chosen():
    assert _C.isas()[0] == "generic"
    assert _C.isa() == _C.isas()[-1]


def test_forcing(isa):
    assert _C.isa() == isa


def test_unknown_name():
    with pytest.raises(KernelError, match="'sse9' is not built.*choose one of generic"):
        _C.set_isa("sse9")
