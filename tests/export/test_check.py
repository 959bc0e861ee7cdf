"""`cfengine export check`: what it accepts, and that it sees what is wrong."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfengine.errors import ExportError
from cfengine.export.check import check, relative
from cfengine.export.folder import export
from cfengine.segments.manifest import Manifest

pytestmark = pytest.mark.cpu


def test_every_graph_and_a_chunk_are_as_exact_as_they_must_be(whole, small, small_model, small_codec) -> None:
    rows = check(whole, small, small_model, small_codec)
    names = [row.what for row in rows]
    assert {"time", "text", "cross 2", "first", "middle 0", "middle 1", "last", "decoder"} < set(names)
    assert [name for name in names if name.startswith("chunk")] == [
        "chunk: x0",
        "chunk: clean flow",
        "chunk: keys",
        "chunk: values",
    ]
    assert all(row.passed and 0 <= row.error <= row.tolerance for row in rows), rows


def test_half_precision_has_its_own_tolerance(small, small_model, tmp_path) -> None:
    manifest = export(small, small_model, tmp_path / "half", precision="fp16")
    rows = check(manifest, small, small_model)
    assert all(row.passed for row in rows), rows
    assert max(row.error for row in rows) > 1e-4  # it is not float32 that ran


def test_bfloat16_is_parsed_and_not_called_checked(small, small_model, tmp_path) -> None:
    model = copy.deepcopy(small_model).to(torch.bfloat16).prepare()
    manifest = export(small, model, tmp_path / "narrow", precision="bf16", graphs=("first", "middle", "last"))
    assert [(row.what, row.error) for row in check(manifest, small, model)] == [
        (name, None) for name in ("first", "middle", "last")
    ]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_wrong_weight_of_one_layer_is_seen(copied, rehashed, small, small_model, layer) -> None:
    """The manifest agrees with the file, so only the numbers can tell."""
    name = f"middle.{layer:02d}.safetensors"
    weights = {key: tensor.clone() for key, tensor in load_file(copied / name).items()}
    weights["post.ffn.2.weight"][0] += 1
    save_file(weights, copied / name)
    rehashed(copied, name)
    failed = [row.what for row in check(Manifest.load(copied), small, small_model) if not row.passed]
    assert f"middle {layer}" in failed and f"middle {1 - layer}" not in failed
    assert "chunk: x0" in failed


def test_sessions_of_a_fixed_number_are_checked_too(small, small_model, tmp_path) -> None:
    manifest = export(small, small_model, tmp_path / "two", sessions=2)
    rows = check(manifest, small, small_model)
    assert all(row.passed for row in rows), rows
    assert "--sessions 2" in manifest.command


def test_a_decoder_of_other_weights_is_named(whole, small, small_model) -> None:
    from cfengine.codec.tiny_world import TinyWorldCodec

    torch.manual_seed(7)
    with pytest.raises(ExportError, match=r"decodes with tiny_world of hash \w+, and 'small' with tiny_world of hash"):
        check(whole, small, small_model, TinyWorldCodec())
    other = dataclasses.replace(small, codec="taehv")
    with pytest.raises(ExportError, match=r"decodes with tiny_world of hash \w+, and 'small' with taehv; check it"):
        check(whole, other, small_model, TinyWorldCodec())


def test_an_error_is_of_equal_shapes() -> None:
    row = torch.ones(1, 4)
    assert relative(row, row) == 0 and relative(row, row.expand(3, 4)) == float("inf")
