"""A folder that is not what it should be: each mistake is a sentence with file, found, expected and command."""

import dataclasses

import pytest
import torch

from cfengine.errors import ExportError
from cfengine.export.backend import open_folder
from cfengine.segments.manifest import NAME, Manifest
from cfengine.segments.onnx import OnnxRunner

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.cpu
COMMAND = "cfengine export onnx --model small --precision fp32 --size 48x32 --sessions open --out"


def test_a_folder_without_a_manifest(copied):
    (copied / NAME).unlink()
    with pytest.raises(ExportError, match="has no manifest.json, so it is no export, or one that was not finished"):
        Manifest.load(copied)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version=3), "has version 3 and this cfengine reads version 2; update cfengine"),
        (lambda d: d.update(version=1), "has version 1 .* export again"),
        (lambda d: d.update(format="other"), "has format 'other' and not 'cfengine-export'"),
        (lambda d: d.pop("graphs"), "is damaged .*'graphs'"),
        (lambda d: d["model"]["config"].update(dim=-1), "is damaged .*dim is -1"),
        (lambda d: d["files"].pop("middle.01.safetensors"), "is damaged .*'middle.01.safetensors'"),
        (lambda d: d.update(precision="int4"), "is damaged .*'int4'"),
    ],
)
def test_a_manifest_of_another_kind(copied, edit_manifest, change, words):
    edit_manifest(copied, change)
    with pytest.raises(ExportError, match=words):
        Manifest.load(copied)


def test_a_manifest_that_is_cut_off(copied):
    text = (copied / NAME).read_text()
    (copied / NAME).write_text(text[: len(text) // 2])
    with pytest.raises(ExportError, match="manifest.json is damaged .*; run cfengine export onnx"):
        Manifest.load(copied)


def test_a_file_that_is_missing(copied):
    (copied / "middle.01.safetensors").unlink()
    with pytest.raises(ExportError, match=f"middle.01.safetensors is missing; run {COMMAND}"):
        Manifest.load(copied)


def test_a_file_that_is_truncated(copied):
    path = copied / "middle.01.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    words = f"has {len(content) - 100} bytes and manifest.json says {len(content)}; it is truncated .* run {COMMAND}"
    with pytest.raises(ExportError, match=words):
        Manifest.load(copied)


@pytest.mark.parametrize("name", ["middle.01.safetensors", "last.onnx"])
def test_a_file_that_was_changed(copied, small, small_model, name):
    content = bytearray((copied / name).read_bytes())
    content[-1] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ExportError, match=f"{name} has hash .* and manifest.json says .* run {COMMAND}"):
        open_folder(small, small_model, copied)


def test_weights_that_are_cut_off_though_the_manifest_agrees(copied, rehashed):
    path = copied / "middle.01.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    rehashed(copied, path.name)
    with pytest.raises(ExportError, match=f"middle.01.safetensors .*is truncated.* run {COMMAND}"):
        OnnxRunner(Manifest.load(copied)).load()


def test_a_graph_that_is_no_graph(copied, rehashed):
    (copied / "middle.onnx").write_bytes(b"no graph")
    rehashed(copied, "middle.onnx")
    with pytest.raises(ExportError, match=f"does not take .*middle.onnx with middle.00.safetensors .* run {COMMAND}"):
        OnnxRunner(Manifest.load(copied)).load()


def test_norms_that_are_missing_from_their_file(copied, rehashed, whole):
    from safetensors.torch import load_file, save_file

    from cfengine.ops import select
    from cfengine.segments.onnx import onnx_segments

    norms = load_file(copied / "norms.safetensors")
    norms.pop("blocks.2.norm_k")
    save_file(norms, copied / "norms.safetensors")
    rehashed(copied, "norms.safetensors")
    with pytest.raises(ExportError, match="norms.safetensors is damaged .*blocks.2.norm_k.* run"):
        onnx_segments(Manifest.load(copied), select("cpu"))


def test_weights_of_another_model(copied, small):
    from cfengine.model.dit import CausalDiT

    torch.manual_seed(5)
    with pytest.raises(ExportError, match=r"was made from weights of hash \w+ \(small\), but those of small have \w+"):
        open_folder(small, CausalDiT(small.model).prepare(), copied)


def test_sizes_of_another_video(copied, small, small_model):
    wide = dataclasses.replace(small, video=dataclasses.replace(small.video, width=64))
    words = r"latent rows and columns \(4, 6\) and 'small' has \(4, 8\); run .*--size 64x32"
    with pytest.raises(ExportError, match=words):
        open_folder(wide, small_model, copied)


def test_another_precision(copied, small, small_model, edit_manifest):
    """The command changes the precision, and not the name of a folder that happens to hold it."""
    folder = copied.rename(copied.parent / "made-in-fp16")
    edit_manifest(folder, lambda d: d.update(precision="fp16"))
    words = f"is in fp16 and the model runs in fp32; an engine has no fp16, .*--precision fp32 --size .*{folder}$"
    with pytest.raises(ExportError, match=words):
        open_folder(small, small_model, folder)


def test_bfloat16_does_not_run_here(copied, edit_manifest):
    edit_manifest(copied, lambda d: d.update(precision="bf16"))
    with pytest.raises(ExportError, match="no matrix product; run .*--precision fp32"):
        OnnxRunner(Manifest.load(copied))


def test_a_graph_that_is_not_there(whole):
    with pytest.raises(ExportError, match="has no graph 'encoder' .it has first, middle"):
        whole.graph("encoder")
