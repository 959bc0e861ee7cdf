"""Ranges for a profiler: nothing without one, names in order with one."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch

from cfengine import ranges

pytestmark = pytest.mark.cpu


@pytest.fixture
def told(monkeypatch):
    """Names of the ranges opened and closed, through a stand-in for the package nvtx."""
    names: list[str] = []

    @contextlib.contextmanager
    def annotate(name):
        names.append(name)
        yield
        names.append(f"end of {name}")

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    ranges._opener.cache_clear()
    yield names
    ranges._opener.cache_clear()


@pytest.fixture
def no_nvtx(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    ranges._opener.cache_clear()
    yield
    ranges._opener.cache_clear()


def test_without_a_profiler_nothing_is_made(no_nvtx, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert ranges.span("a") is ranges.span("b")
    assert ranges.spanned("a", len) is len


def test_torch_serves_where_nvtx_is_missing(no_nvtx, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert ranges._opener() is torch.cuda.nvtx.range


def test_calls_are_named(told):
    assert ranges.spanned("length", len)([1, 2]) == 2
    assert told == ["length", "end of length"]


def test_a_chunk_names_its_passes_and_layers(told, toy_engine, device_session):
    engine = toy_engine()
    with device_session(engine, "a") as session:
        told.clear()
        session.next_chunk()
    assert told[0] == "chunk at frame 0" and told[1:4] == ["denoise", "denoise pass at 1000.0", "layer 0"]
    passes = [name for name in told if name.startswith(("denoise pass", "clean pass"))]
    assert passes == [f"denoise pass at {t}" for t in (1000.0, 937.5, 833.3, 625.0)] + ["clean pass at 0.0"]
    assert told.count("layer 1") == 5 and told.index("decode") < told.index("clean")
