"""TAEHV: the published layout, frame counts, and a stream that equals the whole video."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cfengine.codec import load_codec
from cfengine.codec.taehv import TAEHV, TAEHVCodec
from cfengine.config import EngineConfig, ModelConfig, VideoConfig
from cfengine.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.cpu

# Shapes read from `taehv.py` of github.com/madebyollin/taehv: the numbers in front are places in its nn.Sequential.
LAYOUT = {
    "encoder.0.weight": (64, 3, 3, 3),
    "encoder.2.conv.weight": (64, 128, 1, 1),
    "encoder.3.weight": (64, 64, 3, 3),
    "encoder.4.conv.0.weight": (64, 128, 3, 3),
    "encoder.12.conv.weight": (64, 64, 1, 1),
    "encoder.17.weight": (16, 64, 3, 3),
    "decoder.1.weight": (256, 16, 3, 3),
    "decoder.3.conv.0.weight": (256, 512, 3, 3),
    "decoder.7.conv.weight": (256, 256, 1, 1),
    "decoder.8.weight": (128, 256, 3, 3),
    "decoder.13.conv.weight": (256, 128, 1, 1),
    "decoder.19.conv.weight": (128, 64, 1, 1),
    "decoder.20.weight": (64, 64, 3, 3),
    "decoder.22.bias": (3,),
}


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    model = TAEHV()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):  # torch's own start lets the signal, and the past in it, fade away
                torch.nn.init.kaiming_normal_(module.weight)
        last = model.decoder[22]
        raw = model.decoder.run(torch.randn(2, 16, 2, 3), {})
        last.weight.mul_(0.25 / raw.std())
        last.bias.fill_(0.5)
    return TAEHVCodec(model)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(6, 16, 2, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(2).integers(0, 256, (17, 16, 24, 3), dtype=np.uint8)


def test_the_layout_is_the_published_one():
    shapes = {name: tuple(tensor.shape) for name, tensor in TAEHV().state_dict().items()}
    assert {name: shapes.get(name) for name in LAYOUT} == LAYOUT
    assert "decoder.22.weight" in shapes and "decoder.8.bias" not in shapes and "encoder.3.bias" not in shapes


def spread(shape, k):
    """Numbers in -0.5..0.5 that look random, the same everywhere."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((steps * 0.6180339887498949 + 0.123 * k) ** 2 % 1 - 0.5).view(shape)


def test_the_arithmetic_is_the_published_one():
    model = TAEHV()
    state = model.state_dict()
    for k, (name, tensor) in enumerate(state.items()):
        state[name] = (spread(tensor.shape, k) * (4.5 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1)).float()
    model.load_state_dict(state)
    video = (torch.arange(5 * 16 * 16 * 3) * 37 % 256).view(5, 16, 16, 3).to(torch.uint8).numpy()
    with torch.no_grad():
        pixels = model.decoder.run((spread((3, 16, 2, 2), 0.5) * 4).float(), {})[3:]
    latents = TAEHVCodec(model).encoder().encode(video)
    # what the published implementation gave for these weights: its decoder before the clamp, frames 3 and later; its
    # encoder on the video with its first frame three more times in front.  Five digits were kept; 30 layers of
    # float32 leave an error of 1e-5 of values up to 10.
    wanted = torch.tensor([0.22741, 5.85606, 2.51109, 4.17257, 0.85547, 5.81307, 0.65037, 5.96114, -0.51635])
    torch.testing.assert_close(pixels[:, 1, 5, 9], wanted, rtol=0, atol=2e-4)
    wanted = torch.tensor([[-0.1882, -3.67606, 1.54629, -2.66093], [1.8757, -6.85956, 2.62423, -4.42917]])
    torch.testing.assert_close(latents[:, :4, 1, 0], wanted, rtol=0, atol=2e-4)


def decode(codec, latents, sizes):
    decoder = codec.decoder()
    return np.concatenate([decoder.decode(part) for part in latents.split(sizes)])


def test_a_decoded_stream_equals_the_whole_video(codec, latents):
    whole = decode(codec, latents, [6])
    assert whole.shape == (21, 16, 24, 3) and whole.dtype == np.uint8
    assert whole.std() > 10  # a picture, not one colour
    for sizes in ([3, 3], [1, 2, 3], [1] * 6):
        # convolutions of another batch size may sum in another order: one level where a value sits on a rounding edge
        assert np.abs(decode(codec, latents, sizes).astype(int) - whole).max() <= 1


def test_the_past_is_needed(codec, latents):
    whole = decode(codec, latents, [6])
    fresh = codec.decoder().decode(latents[3:])
    assert np.abs(fresh[1:].astype(int) - whole[13:]).max() > 3


def test_an_encoded_stream_equals_the_whole_video(codec, video):
    whole = codec.encoder().encode(video)
    assert whole.shape == (5, 16, 2, 3)
    for cuts in ([5, 4, 8], [1, 4, 4, 4, 4], [9, 8]):
        encoder = codec.encoder()
        parts = [encoder.encode(part) for part in np.split(video, np.cumsum(cuts)[:-1])]
        # 30 float32 convolutions of up to 1152 products each, which another batch size may sum in another order
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5 * whole.abs().max().item())


def test_two_streams_do_not_meet(codec, latents):
    alone = decode(codec, latents, [3, 3])
    one, two = codec.decoder(), codec.decoder()
    first = one.decode(latents[:3])
    two.decode(latents[3:])
    assert np.array_equal(np.concatenate([first, one.decode(latents[3:])]), alone)


def test_memory_holds_one_frame_a_block(codec, latents):
    decoder = codec.decoder()
    decoder.decode(latents)
    assert {tensor.shape[0] for tensor in decoder.state.values()} == {1} and len(decoder.state) == 9
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in decoder.state.values())


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors", "safetensors/taew2_1.safetensors"])
def test_files_load_strictly(codec, latents, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    state = codec.model.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    for source in (tmp_path, path):
        loaded = TAEHVCodec.from_pretrained(source)
        assert np.array_equal(loaded.decoder().decode(latents[:1]), codec.decoder().decode(latents[:1]))


def test_a_weight_for_more_frames_keeps_the_last(codec, tmp_path):
    state = dict(codec.model.state_dict())
    kept = state["decoder.7.conv.weight"]
    state["decoder.7.conv.weight"] = torch.cat([torch.zeros_like(kept), kept])
    torch.save(state, tmp_path / "taew2_1.pth")
    loaded = TAEHVCodec.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.decoder[7].conv.weight, kept)


def test_weights_of_another_model_are_listed(codec, tmp_path):
    state = dict(codec.model.state_dict())
    state["decoder.1.weight"] = torch.zeros(256, 48, 3, 3)
    state["decoder.99.weight"] = torch.zeros(1)
    state.pop("encoder.0.bias")
    torch.save(state, tmp_path / "taew2_1.pth")
    with pytest.raises(CheckpointError) as error:
        TAEHVCodec.from_pretrained(tmp_path)
    for part in ("decoder.1.weight is [256, 48, 3, 3]", "decoder.99.weight", "encoder.0.bias", "taew2_1.pth"):
        assert part in str(error.value)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds none of taew2_1.safetensors, taew2_1.pth"):
        TAEHVCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize("calls, message", [([4], "first call got 4"), ([5, 5], "later call got 5"), ([1, 0], "got 0")])
def test_a_wrong_number_of_frames(codec, calls, message):
    encoder = codec.encoder()
    with pytest.raises(ConfigError, match=message):
        for count in calls:
            encoder.encode(np.zeros((count, 16, 16, 3), np.uint8))


def test_frames_and_latents_that_cannot_be(codec):
    with pytest.raises(ConfigError, match="24x20 do not divide by the codec's stride 8"):
        codec.encoder().encode(np.zeros((1, 20, 24, 3), np.uint8))
    with pytest.raises(ConfigError, match="float32"):
        codec.encoder().encode(np.zeros((1, 16, 16, 3), np.float32))
    encoder = codec.encoder()
    encoder.encode(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ConfigError, match="24x16 but the stream began with 16x16"):
        encoder.encode(np.zeros((4, 16, 24, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"\(1, 4, 4, 4\)"):
        codec.decoder().decode(torch.zeros(1, 4, 4, 4))


def test_load_codec_holds_the_codec_against_the_configuration(codec, tmp_path):
    torch.save(codec.model.state_dict(), tmp_path / "taew2_1.pth")
    config = EngineConfig(name="x", codec="taehv")
    loaded = load_codec(config, tmp_path, "cpu", torch.bfloat16)
    assert (loaded.latent_channels, loaded.spatial_stride, loaded.temporal_stride) == (16, 8, 4)
    assert loaded.decoder().decode(torch.zeros(1, 16, 2, 2)).shape == (1, 16, 16, 3)
    with pytest.raises(ConfigError, match="latent channels 16 but ModelConfig.out_channels is 48"):
        load_codec(EngineConfig(name="x", codec="taehv", model=ModelConfig(out_channels=48)), tmp_path)
    with pytest.raises(ConfigError, match="temporal stride 4 but VideoConfig.temporal_stride is 8"):
        load_codec(EngineConfig(name="x", codec="taehv", video=VideoConfig(temporal_stride=8)), tmp_path)
    with pytest.raises(ConfigError, match="unknown codec 'jpeg'"):
        load_codec(EngineConfig(name="x", codec="jpeg"), tmp_path)
