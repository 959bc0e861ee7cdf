"""Going on from a picture or a video: which frames count, how they are fitted, and what follows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cfengine import Engine
from cfengine.config import MemoryConfig, preset
from cfengine.errors import ConfigError, OutputError
from cfengine.pictures import Past, fitted
from cfengine.training import world
from cfengine.video import VideoWriter

pytestmark = pytest.mark.cpu

CONFIG = preset("tiny-world")
HEIGHT, WIDTH = CONFIG.video.height, CONFIG.video.width


def numbered(count: int) -> np.ndarray:
    """Frames that say which they are."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, HEIGHT, WIDTH, 3)).copy()


def numbers(past: Past) -> list[list[int]]:
    return [chunk[:, 0, 0, 0].tolist() for chunk in past.chunks()]


@pytest.mark.parametrize("count", [1, 5, 9, 10, 20, 21, 40])
def test_a_video_of_any_length_ends_where_a_chunk_does(count):
    found = numbers(Past(CONFIG, video=numbered(count)))
    assert [len(chunk) for chunk in found] == [9] + [12] * (len(found) - 1)
    flat = sum(found, [])
    if count < 9:
        assert flat == [0] * (9 - count) + list(range(count))
    else:
        assert flat == list(range(count - len(flat), count)) and count - len(flat) < 12


def test_a_picture_stands_still_for_a_chunk():
    image = numbered(8)[7]
    (chunk,) = Past(CONFIG, image=image).chunks()
    assert chunk.shape == (9, HEIGHT, WIDTH, 3) and (chunk == image).all()
    single = dataclasses.replace(CONFIG, memory=MemoryConfig(chunk_frames=1))
    assert [chunk.shape[0] for chunk in Past(single, image=image).chunks()] == [1]
    assert numbers(Past(single, video=numbered(6))) == [[1], [2, 3, 4, 5]]


def test_pictures_are_cut_to_the_middle_and_scaled():
    assert fitted(frame := numbered(1)[0], WIDTH, HEIGHT) is frame
    stripes = np.zeros((40, 300, 3), np.uint8)  # wide: left and right are cut
    stripes[:, 120:180] = 200
    found = fitted(stripes, WIDTH, HEIGHT)
    assert found.shape == (HEIGHT, WIDTH, 3) and found.dtype == np.uint8
    assert (found == 200).all()  # the middle 60 columns of 300 have the video's shape
    tall = np.zeros((500, 30, 3), np.uint8)
    tall[240:260] = 99
    assert (fitted(tall, WIDTH, HEIGHT) == 99).all()
    ramp = np.broadcast_to(np.linspace(0, 255, 2 * WIDTH).astype(np.uint8)[None, :, None], (2 * HEIGHT, 2 * WIDTH, 3))
    halved = fitted(ramp, WIDTH, HEIGHT).astype(int)
    # away from the edges a filter leaves a straight ramp as it is, to a level of rounding
    assert np.abs(halved - ramp[::2, ::2].astype(int))[:, 4:-4].max() <= 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "neither of image and video"),
        ({"image": numbered(1)[0], "video": numbered(1)}, "both of image and video"),
        ({"image": numbered(1)}, r"image is uint8 \(1, 64, 96, 3\); give uint8 RGB of shape \(height, width, 3\)"),
        ({"image": numbered(1)[0].astype(np.float32)}, "image is float32"),
        ({"video": numbered(1)[0]}, r"video is uint8 \(64, 96, 3\); give .*\(frames, height, width, 3\)"),
        ({"video": numbered(2)[..., :1]}, r"video is uint8 \(2, 64, 96, 1\)"),
        ({"video": numbered(2)[:0]}, "nothing of it empty"),
        ({"video": [numbered(1)[0]]}, "video to go on from is a list; give an array"),
        ({"image": torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8)}, "image to go on from is a Tensor"),
    ],
)
def test_what_is_no_picture_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        Past(CONFIG, **given)


def test_files(tmp_path):
    """A picture and a video from files; the numbers of frames survive the coding of the video."""
    from PIL import Image

    frames = 10 * numbered(21)
    with VideoWriter(tmp_path / "in.mp4", fps=16) as writer:
        for frame in frames:
            writer.write(frame)
    found = sum(numbers(Past(CONFIG, video=tmp_path / "in.mp4")), [])
    assert len(found) == 21 and np.abs(np.array(found) - 10 * np.arange(21)).max() <= 3  # limited range, 8 bits
    Image.fromarray(frames[4]).save(tmp_path / "in.png")
    (chunk,) = Past(CONFIG, image=str(tmp_path / "in.png")).chunks()
    assert (chunk == 40).all()
    with pytest.raises(OutputError, match="does not exist"):
        Past(CONFIG, video=tmp_path / "no.mp4")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(OutputError, match="cannot be read"):
        list(Past(CONFIG, image=tmp_path / "bad.png").chunks())


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - two) ** 2)))


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny-world") as engine:
        yield engine


def filmed(chunks: int) -> tuple[np.ndarray, str]:
    """A camera that pans right over a world, and the prompt for it."""
    draw = np.random.default_rng(4)
    scene, rate = world.random_scene(draw), world.RATES["right"]
    return world.render(scene, world.camera_yaws([rate] * chunks, 40.0)), world.prompt_for(rate, scene.look)


@pytest.mark.slow
def test_the_small_world_goes_on_from_a_video(engine, monkeypatch):
    """What was given is the decoder's past, and the first frames made follow from it as a true camera's would."""
    frames, prompt = filmed(6)
    given, truth = frames[:45], frames[45:57]
    decoded = []
    decoder = type(engine.codec.decoder())
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda *args: decoded.append(decode(*args)) or decoded[-1])
    with engine.session(prompt, seed=1, video=np.concatenate([given[:5], given])) as session:
        past = np.concatenate(decoded)
        assert past.shape == given.shape and psnr(past, given) > 33  # the codec gives 36
        made = session.next_chunk()
        assert [frame.index for frame in made] == list(range(45, 57))
        kept = session.memory.tables.layers[0].sources.tolist()
        assert {0, 1, 2} <= set(kept)  # the beginning is the sink
    shown = np.stack([frame.pixels for frame in made])
    # 34.6 dB from what a true camera sees next; the last given frame is 19.3 from that, and a world not primed 18.0
    assert psnr(shown, truth) > 28
    assert psnr(shown[0], given[-1]) > 24  # 27.0, and a true camera's next frame 26.5


@pytest.mark.slow
def test_the_small_world_goes_on_from_a_picture(engine):
    frames, prompt = filmed(1)
    stream = engine.stream(prompt.replace("pan right", "hold"), seed=1, num_frames=12, image=frames[0])
    made = list(stream)
    assert [frame.index for frame in made] == list(range(9, 21))
    assert (
        psnr(np.stack([frame.pixels for frame in made]), np.broadcast_to(frames[0], (12, *frames[0].shape))) > 34
    )  # 39.5


def test_the_past_comes_from_one_place(engine):
    image = numbered(1)[0]
    with pytest.raises(ConfigError, match="latents and image are given"):
        engine.session("hold", image=image, latents=torch.zeros(3, 16, 8, 12))
    with pytest.raises(ConfigError, match="image is uint8"):
        engine.stream("hold", image=image[0])  # at the call
    assert not engine._sessions


def test_a_video_in_parts_is_encoded_as_a_whole(engine):
    """Any length, chunk by chunk: the latents that the memory sees are those of the whole video."""
    frames, prompt = filmed(3)
    whole = engine.codec.encoder().encode(frames)
    with engine.session(prompt, seed=1, video=frames) as one, engine.session(prompt, seed=1, latents=whole) as two:
        assert torch.equal(one._lane._kept[0].of(6), whole[6:9])
        assert one.next_chunk()[0].pixels.tobytes() == two.next_chunk()[0].pixels.tobytes()
