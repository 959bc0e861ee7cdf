"""What a folder holds: standard operators, weights by name, one graph for equal layers."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from cfengine.errors import ConfigError, ExportError
from cfengine.export.folder import export
from cfengine.export.graphs import DOMAINS, OPSET, check_domains, trace, with_weights
from cfengine.export.parts import Part, Port, dit_parts
from cfengine.segments.manifest import NAME, Manifest

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.cpu


def test_operators_are_standard_ones(whole):
    assert set(whole.graphs) == {"first", "middle", "last", "time", "text", "cross", "decoder"}
    for graph in whole.graphs.values():
        proto = onnx.load(whole.folder / graph.file, load_external_data=False)
        assert {node.domain for node in proto.graph.node} <= DOMAINS and not proto.functions
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", OPSET)]
        onnx.checker.check_model(str(whole.folder / graph.file))


def test_operands_are_those_of_the_manifest(whole):
    for graph in whole.graphs.values():
        proto = onnx.load(whole.folder / graph.file, load_external_data=False)
        for values, operands in ((proto.graph.input, graph.inputs), (proto.graph.output, graph.outputs)):
            found = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
            assert found == {operand.name: operand.shape for operand in operands}


def test_graphs_do_not_tell_of_this_machine(whole):
    for graph in whole.graphs.values():
        assert b"/" + b"site-packages" not in (whole.folder / graph.file).read_bytes()
        assert b"parts.py" not in (whole.folder / graph.file).read_bytes()


@pytest.mark.parametrize("index", [0, 1])
def test_one_graph_serves_the_weights_of_every_layer(whole, small_model, index):
    proto = with_weights(whole, "middle", index)
    onnx.load_external_data_for_model(proto, str(whole.folder))
    found = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    block, following = small_model.blocks[index], small_model.blocks[index + 1]
    wanted = {
        "post.self_attn.o.weight": block.self_attn.o.weight,
        "post.cross_attn.q.weight": block.cross_attn.q.weight,
        "post.norm3.shift": block.norm3_shift,
        "post.ffn.2.weight": block.ffn[2].weight,
        "pre.self_attn.qkv.weight": following.products["self_attn.qkv"].weight,
    }
    for name, weight in wanted.items():
        assert (found[name] == weight.numpy()).all(), name


def test_equal_weights_are_not_merged(whole):
    for graph in whole.graphs.values():
        proto = onnx.load(whole.folder / graph.file, load_external_data=False)
        outside = {each.name for each in proto.graph.initializer if each.external_data}
        inputs = {name for node in proto.graph.node for name in node.input}
        weights = set(load_file(whole.folder / graph.weights[0]))
        assert outside == weights <= inputs, graph.name  # each is there, and read by some node


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_narrow_export_has_narrow_weights_and_wide_norms(small, small_model, tmp_path, precision):
    manifest = export(small, small_model, tmp_path / "narrow", precision=precision, graphs=("middle",))
    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / "narrow/middle.00.safetensors").items()}
    assert {kinds.pop(f"post.norm3.{part}") for part in ("shift", "scale")} == {torch.float32}
    assert set(kinds.values()) == {manifest.dtype}
    onnx.checker.check_model(str(tmp_path / "narrow/middle.onnx"))
    assert manifest.graph("middle").inputs[0].dtype == str(manifest.dtype).removeprefix("torch.")


def test_a_model_of_one_layer_has_no_middle(with_layers):
    from cfengine.model.dit import CausalDiT

    config = with_layers(1)
    parts = dit_parts(config, CausalDiT(config.model).prepare(), torch.float32, 1)
    assert [part.name for part in parts] == ["first", "last", "time", "text", "cross"]


class Inverse(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.eigh(x).eigenvalues


def test_an_operator_that_does_not_export_is_named():
    port = Port(torch.float32, (3, 3))
    with pytest.raises(ExportError, match=f"odd does not export to ONNX opset {OPSET} .*eigh"):
        trace(Part("odd", Inverse(), {"x": port}, {"y": Port(torch.float32, (3,))}, (dict,)))


def test_an_operator_of_another_domain_is_named():
    node = onnx.helper.make_node("FusedMatMul", ["a"], ["b"], domain="com.microsoft")
    inner = onnx.helper.make_graph([node], "inner", [], [])
    outer = onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner)
    proto = onnx.helper.make_model(onnx.helper.make_graph([outer], "outer", [], []))
    with pytest.raises(ExportError, match="graph 'odd' has com.microsoft::FusedMatMul"):
        check_domains("odd", proto)


def test_options_that_cannot_be(small, small_model, tmp_path):
    import dataclasses

    from cfengine.config import PRECISIONS

    with pytest.raises(ConfigError, match="'fp8' cannot be exported; choose one of fp32, fp16, bf16"):
        export(small, small_model, tmp_path / "out", precision="fp8")
    rounded = dataclasses.replace(small, precision=PRECISIONS["fp8"])
    with pytest.raises(ConfigError, match="load it with precision 'bf16'"):
        export(rounded, small_model, tmp_path / "out")
    for sessions in (0, "open"):
        with pytest.raises(ConfigError, match=f"sessions is {sessions!r}; give a number from 1"):
            export(small, small_model, tmp_path / "out", sessions=sessions)
    with pytest.raises(ConfigError, match="no graph 'encoder' to export; choose among first, middle, last"):
        export(small, small_model, tmp_path / "out", graphs=("encoder",))
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_what_it_was_made_of(whole, small):
    about = json.loads((whole.folder / NAME).read_text())
    assert about["model"]["config"]["dim"] == small.model.dim and about["made_with"]["torch"] == torch.__version__
    assert set(about["files"]) == {path.name for path in whole.folder.iterdir()} - {NAME}
    assert Manifest.load(whole.folder) == whole


def test_a_graph_says_what_it_is_without_its_folder(whole):
    for name, graph in whole.graphs.items():
        proto = onnx.load(whole.folder / graph.file, load_external_data=False)
        told = {entry.key: entry.value for entry in proto.metadata_props}
        assert told["cfengine.role"] == name and told["cfengine.precision"] == "fp32"
        weights = whole.codec_hash if name == "decoder" else whole.model_hash
        assert told["cfengine.weights_hash"] == weights
        shapes = {operand.name: list(operand.shape) for operand in (*graph.inputs, *graph.outputs)}
        assert json.loads(told["cfengine.shapes"]) == shapes


def test_the_command_makes_the_same_folder_again(whole):
    command = "cfengine export onnx --model small --precision fp32 --size 48x32 --sessions open --out"
    assert whole.command == f"{command} {whole.folder}"
    assert dataclasses.replace(whole, codec="taehv", codec_source="a b.safetensors", sessions=3).command_in("bf16") == (
        f"cfengine export onnx --model small --precision bf16 --size 48x32 --sessions 3 --taehv 'a b.safetensors' "
        f"--out {whole.folder}"
    )
