"""Decoders as graphs, their past as operands: a stream of three chunks equals the codec's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cfengine.codec.taehv import TAEHV, TAEHVCodec
from cfengine.export.folder import export
from cfengine.export.streams import DecoderStream, graph_call
from cfengine.segments.onnx import OnnxRunner

pytestmark = pytest.mark.cpu
GRAPHS = {"tiny_world": {"decoder"}, "taehv": {"decoder"}, "wan_vae": {"decoder_start", "decoder"}}


def loud(net: torch.nn.Module) -> torch.nn.Module:
    """Weights under which the past is not lost on the way."""
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.kaiming_normal_(module.weight)
    return net.eval().requires_grad_(False)


def codec_of(name: str, small_codec):
    torch.manual_seed(0)
    if name == "taehv":
        return TAEHVCodec(loud(TAEHV()))
    if name == "wan_vae":
        diffusers = pytest.importorskip("diffusers")
        from cfengine.codec.wan_vae import WanVAECodec

        return WanVAECodec(loud(diffusers.AutoencoderKLWan(base_dim=4)))
    return small_codec


@pytest.mark.parametrize("name", GRAPHS)
def test_a_stream_through_graphs_equals_the_codecs_own(small, small_model, small_codec, tmp_path, name) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    codec = codec_of(name, small_codec)
    config = dataclasses.replace(small, codec=name)
    manifest = export(config, small_model, tmp_path / name, codec=codec, graphs=tuple(GRAPHS[name]))
    assert set(manifest.graphs) == GRAPHS[name] and manifest.codec == name
    ours, theirs = DecoderStream(manifest, graph_call(manifest, OnnxRunner(manifest))), codec.decoder()
    video = config.video
    draw = torch.Generator().manual_seed(0)
    shape = config.memory.chunk_frames, config.model.in_channels, video.latent_height, video.latent_width
    for chunk in range(3):
        latents = torch.randn(shape, generator=draw)
        found, expected = ours.draw(latents), theirs.draw(latents)
        assert found.shape == expected.shape == (12 if chunk else 9, video.height, video.width, 3)
        # sums in another order may take a value at the edge of two levels to either side
        assert (found.int() - expected.int()).abs().max() <= 1
    # the past counts: in a stream that begins with the last chunk, its first latent (last frame) looks different
    fresh = DecoderStream(manifest, graph_call(manifest, OnnxRunner(manifest))).draw(latents)
    assert (fresh[0].int() - found[3].int()).abs().max() > 1
