"""The measure of what each part of fp8 costs, on a toy."""

from __future__ import annotations

import pytest
import torch

from cfengine.bench import fp8_parts
from cfengine.bench.synthetic import SIZES
from cfengine.config import PRODUCTS

pytestmark = pytest.mark.cpu


def test_one_product_at_a_time():
    for product in PRODUCTS:
        assert fp8_parts.PARTS[product].fp8_products(3) == {product}


def test_parts_are_told_apart(monkeypatch):
    monkeypatch.setattr(fp8_parts, "RANDOM", SIZES["toy"])
    names = ("ffn.2", "pages and attention", "fp8")
    with torch.inference_mode():
        found = fp8_parts.measure("random", 1, {name: fp8_parts.PARTS[name] for name in names})
    worst = {name: max(errors[0]) for name, errors in found.items()}
    assert all(len(errors[0]) == 5 for errors in found.values())
    assert 0 < worst["ffn.2"] < worst["fp8"] < 0.2 and 0 < worst["pages and attention"] < 0.2
