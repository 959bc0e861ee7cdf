"""The Wan VAE: both published layouts, and a stream that equals diffusers' own decoding of the whole video."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cfengine.codec import load_codec
from cfengine.codec.wan_vae import WanVAECodec, to_diffusers
from cfengine.config import EngineConfig
from cfengine.errors import CheckpointError, ConfigError

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=4).eval().requires_grad_(False)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, (torch.nn.Conv3d, torch.nn.Conv2d)):  # so that the past is not lost on the way
                torch.nn.init.kaiming_normal_(module.weight)
        out = vae.decoder.conv_out
        out.weight.mul_(0.5)
    return vae


@pytest.fixture(scope="module")
def codec(vae):
    return WanVAECodec(vae)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(5, 16, 2, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(2).integers(0, 256, (13, 16, 24, 3), dtype=np.uint8)


def decode(codec, latents, sizes):
    decoder = codec.decoder()
    return np.concatenate([decoder.decode(part) for part in latents.split(sizes)])


def test_a_decoded_stream_equals_diffusers_on_the_whole(vae, codec, latents):
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    whole = vae.decode(latents.transpose(0, 1)[None] * std + mean).sample[0]
    levels = ((whole + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert levels.shape == (17, 16, 24, 3) and 20 < levels.std() < 120  # neither one colour nor all clipped
    stream = decode(codec, latents, [5])
    # diffusers runs the 1x1x1 post_quant_conv on all latents at once, which may sum in another order: one level where a
    # value sits on a rounding edge
    assert np.abs(stream.astype(int) - levels).max() <= 1
    for sizes in ([3, 2], [1, 3, 1]):
        assert np.array_equal(decode(codec, latents, sizes), stream)  # here it is latent by latent, however they come


def test_the_past_is_needed(codec, latents):
    whole = decode(codec, latents, [5])
    assert np.abs(codec.decoder().decode(latents[3:])[1:].astype(int) - whole[13:]).max() > 10


def test_an_encoded_stream_equals_diffusers_on_the_whole(vae, codec, video):
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1
    mean = torch.tensor(vae.config.latents_mean).view(16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(16, 1, 1, 1)
    whole = ((vae.encode(pixels).latent_dist.mode()[0] - mean) / std).transpose(0, 1)
    assert whole.shape == (4, 16, 2, 3)
    for cuts in ([13], [5, 8], [1, 4, 4, 4]):
        encoder = codec.encoder()
        parts = [encoder.encode(part) for part in np.split(video, np.cumsum(cuts)[:-1])]
        # same convolutions on the same groups; only the 1x1x1 quant_conv is batched over time in diffusers
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_two_streams_do_not_meet(codec, latents):
    alone = decode(codec, latents, [3, 2])
    one, two = codec.decoder(), codec.decoder()
    first = one.decode(latents[:3])
    two.decode(latents[2:])
    assert np.array_equal(np.concatenate([first, one.decode(latents[3:])]), alone)


def test_memory_of_a_stream_stops_growing(codec, latents):
    decoder = codec.decoder()
    decoder.decode(latents[:3])
    held = [part.shape for part in decoder.state.values() if isinstance(part, torch.Tensor)]
    decoder.decode(latents)
    assert [part.shape for part in decoder.state.values() if isinstance(part, torch.Tensor)] == held
    assert held and all(shape[2] <= 2 for shape in held)


# layouts


def official(name):
    """diffusers -> official, written from `wan/modules/vae.py`, independently of the table under test."""
    for new, old in (("post_quant_conv.", "conv2."), ("quant_conv.", "conv1.")):
        if name.startswith(new):
            return name.replace(new, old)
    name = name.replace(".conv_in.", ".conv1.").replace(".norm_out.", ".head.0.").replace(".conv_out.", ".head.2.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"middle.{2 * int(match[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle.1").replace("down_blocks", "downsamples")
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"upsamples.{4 * int(match[1]) + 3}", name)
    if re.search(r"(downsamples|upsamples|middle)\.\d+\.(norm|conv)", name):
        for new, old in (("norm1", "0"), ("conv1", "2"), ("norm2", "3"), ("conv2", "6")):
            name = name.replace(f".{new}.", f".residual.{old}.")
    return name.replace(".conv_shortcut.", ".shortcut.")


def test_the_official_file(vae, codec, latents, tmp_path):
    state = {official(name): tensor for name, tensor in vae.state_dict().items()}
    # read off `wan/modules/vae.py` at base width 4, so that the helper above is not its own witness
    assert state["decoder.upsamples.3.time_conv.weight"].shape == (32, 16, 3, 1, 1)
    assert state["decoder.upsamples.4.shortcut.weight"].shape == (16, 8, 1, 1, 1)
    assert state["decoder.upsamples.14.residual.6.weight"].shape == (4, 4, 3, 3, 3)
    assert state["encoder.downsamples.5.time_conv.weight"].shape == (8, 8, 3, 1, 1)
    assert state["encoder.middle.1.to_qkv.weight"].shape == (48, 16, 1, 1)
    assert state["encoder.head.2.weight"].shape == (32, 16, 3, 3, 3)
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    for source in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
        loaded = WanVAECodec.from_pretrained(source)
        assert np.array_equal(loaded.decoder().decode(latents[:2]), codec.decoder().decode(latents[:2]))


def test_names_agree_with_diffusers_own_conversion(vae):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    names = [official(name) for name in vae.state_dict()]
    theirs = convert_wan_vae_to_diffusers({name: name for name in names})
    assert {name: to_diffusers(name) for name in names} == {old: new for new, old in theirs.items()}
    assert {to_diffusers(name) for name in names} == set(vae.state_dict())


@pytest.mark.parametrize("place", ["vae", "."])
def test_the_diffusers_folder(vae, codec, latents, tmp_path, place):
    vae.save_pretrained(tmp_path / place)
    loaded = WanVAECodec.from_pretrained(tmp_path)
    assert np.array_equal(loaded.decoder().decode(latents[:2]), codec.decoder().decode(latents[:2]))


def test_mean_and_deviation_come_from_the_configuration(tmp_path):
    other = diffusers.AutoencoderKLWan(base_dim=4, z_dim=2, latents_mean=[0.5, 1.0], latents_std=[2.0, 3.0])
    other.save_pretrained(tmp_path)
    loaded = WanVAECodec.from_pretrained(tmp_path)
    assert loaded.latent_channels == 2
    assert loaded.mean.flatten().tolist() == [0.5, 1.0] and loaded.std.flatten().tolist() == [2.0, 3.0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latents_mean": [0.5]}))
    with pytest.raises(ConfigError, match="latents_mean has 1 values for 2 latent channels"):
        WanVAECodec.from_pretrained(tmp_path)


def test_load_codec(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    loaded = load_codec(EngineConfig(name="x"), tmp_path, "cpu", torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.decoder().decode(torch.zeros(1, 16, 2, 2)).shape == (1, 16, 16, 3)


def test_what_does_not_fit_is_listed(vae, tmp_path):
    state = {official(name): tensor for name, tensor in vae.state_dict().items()}
    state.pop("decoder.head.2.bias")
    state["decoder.middle.1.proj.weight"] = torch.zeros(3)
    state["decoder.upsamples.40.residual.0.gamma"] = torch.zeros(3)
    save_file(state, tmp_path / "Wan2.1_VAE.safetensors")
    with pytest.raises(CheckpointError) as error:
        WanVAECodec.from_pretrained(tmp_path)
    for part in ("decoder.conv_out.bias", "attentions.0.proj.weight is [3]", "up_blocks.10.resnets.0.norm1.gamma"):
        assert part in str(error.value)


def test_a_wan_2_2_vae_is_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_residual": True}))
    with pytest.raises(CheckpointError, match=r"Wan 2\.2 VAE"):
        WanVAECodec.from_pretrained(tmp_path)


def test_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="holds none of Wan2.1_VAE.pth"):
        WanVAECodec.from_pretrained(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match="it is no Wan VAE"):
        WanVAECodec.from_pretrained(tmp_path)


def test_a_wrong_number_of_frames(codec):
    with pytest.raises(ConfigError, match="first call got 4 frames"):
        codec.encoder().encode(np.zeros((4, 16, 16, 3), np.uint8))
    encoder = codec.encoder()
    encoder.encode(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ConfigError, match="later call got 3 frames"):
        encoder.encode(np.zeros((3, 16, 16, 3), np.uint8))
