"""The quality bench with small random DINOv2 and CLIP from disk, on files and on a model; no network."""

from __future__ import annotations

import json
import shutil
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cfengine.bench import quality
from cfengine.bench.quality_models import Models
from cfengine.bench.quality_sources import is_model, video_frames
from cfengine.bench.quality_windows import Windows, measure
from cfengine.errors import CheckpointError, ConfigError, OutputError, PromptError
from cfengine.video import VideoWriter

pytestmark = pytest.mark.cpu

ONE = 1e-5  # float32: a batch of another size may add up in another order, some 1e-7 relative over a few dozen terms


# Small random models --------------------------------------------------------------------------------------------------


def write_json(path, value):
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of random models, with processor files as the hub has them and a tokenizer without merges."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    alphabet = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    pytest.importorskip("PIL", reason="pip install pillow")
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    eye = small | {"image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**eye)).save_pretrained(home / "dinov2")
    letters = sorted(alphabet)
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = small | {"intermediate_size": 32, "vocab_size": len(words), "bos_token_id": 512, "eos_token_id": 513}
    config = transformers.CLIPConfig(text_config=text, vision_config=eye | {"intermediate_size": 32}, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(home / "clip")
    norms = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_resize": True, "do_normalize": True, "resample": 3}
    dinov2 = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": True}
    write_json(home / "dinov2/preprocessor_config.json", norms | dinov2 | {"crop_size": {"height": 28, "width": 28}})
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28, "do_center_crop": True}
    write_json(home / "clip/preprocessor_config.json", norms | clip)
    write_json(home / "clip/vocab.json", {word: place for place, word in enumerate(words)})
    (home / "clip/merges.txt").write_text("#version: 0.2\n")
    write_json(home / "clip/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    return SimpleNamespace(home=home, dinov2=str(home / "dinov2"), clip=str(home / "clip"))


@pytest.fixture(scope="module")
def models(saved):
    return Models.load(saved.dinov2, saved.clip)


def noise(seed, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_identical_frames_are_alike_and_others_are_not(models):
    same, other = noise(0), noise(1)
    frames = ((Fraction(k, 4), lambda k=k: other if k == 9 else same) for k in range(10))
    seen = measure(frames, models, Windows((Fraction(1), Fraction(2)), batch=3))
    for name in ("dinov2", "clip_f"):
        assert seen.means[name][1] == pytest.approx(1, abs=ONE)
        assert seen.means[name][2] < 1 - 100 * ONE  # frame 9 differs


def test_vectors_are_those_of_the_models(models):
    """CLIP's own comparison of pictures and words, and DINOv2's class token, one frame at a time."""
    frames = [noise(seed, 32 + 8 * seed, 48) for seed in range(3)]
    words = "a fox in the snow"
    found, text = models.images(frames), models.text(words)
    assert (text.tokens, text.read) == (15, 15)  # 13 letters, start and end
    ids = models.tokenizer(words, return_tensors="pt")["input_ids"]
    for place, frame in enumerate(frames):
        shown = models.views["clip"](images=frame, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            logits = models.clip(input_ids=ids, pixel_values=shown).logits_per_image / models.clip.logit_scale.exp()
            eye = models.views["dinov2"](images=frame, return_tensors="pt")["pixel_values"]
            token = models.dinov2(pixel_values=eye).last_hidden_state[0, 0]
        assert float(found["clip"][place] @ text.vector) == pytest.approx(float(logits), abs=ONE)
        assert torch.allclose(found["dinov2"][place], token / token.norm(), atol=ONE)


def test_a_long_prompt_is_read_to_its_77th_token(models):
    long = models.text("x" * 50 + " " + "y" * 50)
    assert (long.tokens, long.read) == (102, 77)
    cut = models.text("x" * 50 + " " + "y" * 25)
    assert cut.read == 77 and cut.tokens == 77
    # the end token takes the last place; of the words before it only the last differs, by its end-of-word mark
    assert float(long.vector @ cut.vector) > 0.9
    with pytest.raises(PromptError, match="empty"):
        models.text("  ")


# Files and the command ------------------------------------------------------------------------------------------------


def film(path, frames, fps=4):
    with VideoWriter(path, fps=fps) as writer:
        for pixels in frames:
            writer.write(pixels)
    return str(path)


def flat(value):
    return np.full((32, 48, 3), value, np.uint8)


@pytest.fixture
def run(saved, capsys):
    """run(*words) -> (exit code, standard output, standard error) with the random models."""

    def command(*words):
        code = quality.main([*words, "--dinov2", saved.dinov2, "--clip", saved.clip, "--device", "cpu"])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return command


def test_times_of_a_file_are_its_own(tmp_path):
    frames = list(video_frames(film(tmp_path / "a.mp4", [flat(10 * k) for k in range(7)], fps=8)))
    assert [time for time, _ in frames] == [Fraction(k, 8) for k in range(7)]
    values = [float(pixels().mean()) for _, pixels in frames]
    assert np.allclose(values, [10 * k for k in range(7)], atol=3)  # levels that limited range and H.264 cost


def test_files_through_the_command(run, tmp_path):
    still = film(tmp_path / "still.mp4", [flat(100)] * 13)  # 3 s and a frame
    short = film(tmp_path / "short.mp4", [noise(k, 32, 48) for k in range(8)])
    path = tmp_path / "records.json"
    code, out, err = run(still, short, "--at", "1,3,10", "--json", str(path), "--prompt", "grey")
    assert code == 0, err
    found = {entry["name"]: entry for entry in json.loads(path.read_text())}
    assert set(found) == {f"quality_{name}_{t}s" for name in ("dinov2", "clip_f", "clip_t") for t in (1, 3)}
    both, late = found["quality_dinov2_1s"], found["quality_dinov2_3s"]
    # a flat picture comes out of H.264 the same in every frame
    assert late["value"] == pytest.approx(100, abs=100 * ONE) and late["unit"] == "cosine x 100"
    assert [video["source"] for video in late["config"]["videos"]] == [still]
    assert [video["frames"] for video in both["config"]["videos"]] == [5, 5]
    values = [video["value"] for video in both["config"]["videos"]]
    assert both["value"] == pytest.approx(sum(values) / 2) and values[1] < values[0]
    assert both["config"]["window_seconds"] == [0.5, 1.5]
    assert found["quality_clip_t_1s"]["config"]["videos"][0]["prompt"] == "grey"
    assert f"{short} has its last frame at 1.75 s: no frame within 0.5 s of 3, 10 s, left out" in out
    assert "mean of 2 videos" in out and "of 2 videos not all are in every mean: 3 s of 1" in out


def test_without_a_prompt_clip_t_is_left_out(run, tmp_path):
    still, path = film(tmp_path / "still.mp4", [flat(100)] * 8), tmp_path / "records.json"
    code, out, _ = run(still, "--at", "1", "--json", str(path))
    assert code == 0 and f"CLIP-T of {still} is left out: it has no --prompt" in out
    assert not any(line.split()[:1] == ["clip_t"] for line in out.splitlines())
    assert {entry["name"] for entry in json.loads(path.read_text())} == {"quality_dinov2_1s", "quality_clip_f_1s"}


def test_a_long_prompt_is_said(run, tmp_path):
    still, path = film(tmp_path / "still.mp4", [flat(100)] * 8), tmp_path / "records.json"
    code, out, _ = run(still, "--at", "1", "--prompt", "x" * 100, "--json", str(path))
    assert code == 0 and f"CLIP reads 77 tokens and the prompt of {still} has 102" in out
    (record,) = [entry for entry in json.loads(path.read_text()) if "clip_t" in entry["name"]]
    assert [record["config"]["videos"][0][name] for name in ("prompt_tokens", "tokens_read")] == [102, 77]


def test_a_prompt_for_each(run, tmp_path):
    still, path = film(tmp_path / "still.mp4", [flat(100)] * 8), tmp_path / "records.json"
    words = ["--prompt", "a fox", "--prompt", "the sea at night"]
    assert run(still, still, "--at", "1", *words, "--json", str(path))[0] == 0
    found = {entry["name"]: entry["config"]["videos"] for entry in json.loads(path.read_text())}
    assert [video["prompt"] for video in found["quality_clip_t_1s"]] == ["a fox", "the sea at night"]
    one, two = (video["value"] for video in found["quality_clip_t_1s"])
    assert abs(one - two) > 100 * ONE


def test_a_model_is_streamed_and_measured(run, tmp_path):
    path = tmp_path / "records.json"
    words = ["--prompt", "pan right over green hills, clear sky", "--seconds", "1", "--seed", "3", "--at", "0.5,2"]
    code, out, err = run("tiny-world", *words, "--json", str(path))
    assert code == 0, err
    assert "tiny-world has its last frame at 0.94 s" in out  # 16 frames at 16 a second
    found = {entry["name"]: entry for entry in json.loads(path.read_text())}
    assert set(found) == {"quality_dinov2_0.5s", "quality_clip_f_0.5s", "quality_clip_t_0.5s"}
    shape = found["quality_dinov2_0.5s"]["config"]
    assert shape["seed"] == 3 and shape["videos"][0]["frames"] == 16
    assert found["quality_dinov2_0.5s"]["value"] < 100


def test_sources_are_told_apart(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "film").touch()
    for model in ("tiny-world", "owner/model-1.3B", str(tmp_path), str(tmp_path / "model.safetensors")):
        assert is_model(model)
    assert not is_model(str(tmp_path / "film"))
    for gone in ("nonsense", "gone.mp4", "folder/gone.mp4", "/no/such", "./no/such"):
        with pytest.raises(OutputError, match="neither a video file nor a model"):
            is_model(gone)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.mp4"], "'gone.mp4' is neither a video file nor a model"),
        (["STILL", "--at", "soon"], "--at is 'soon'"),
        (["STILL", "--at", "0"], "--at is 0"),
        (["STILL", "--at", "50"], "no video has a frame within 0.5 s of 50 s"),
        (["STILL", "--json", "gone/records.json"], "gone"),
        (["STILL", "STILL", "STILL", "--prompt", "a", "--prompt", "b"], "2 prompts and 3 videos"),
        (["tiny-world"], "the model 'tiny-world' has no prompt"),
        (["tiny-world", "--prompt", "pan", "--seconds", "0"], "--seconds is 0"),
        (["TEXT"], "cannot be read as a video"),
    ],
)
def test_mistakes_are_sentences(words, message, run, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    known = {"STILL": film(tmp_path / "still.mp4", [flat(100)] * 2), "TEXT": str(tmp_path / "notes.mp4")}
    code, _, err = run(*(known.get(word, word) for word in words))
    assert code == 1 and "error: " in err and message in err and "Traceback" not in err


def test_an_unknown_device_is_a_sentence(capsys):
    assert quality.main(["tiny-world", "--device", "tpu"]) == 1
    assert "unknown device 'tpu'" in capsys.readouterr().err


def test_models_that_cannot_be_used_are_sentences(saved, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"\(--dinov2\): no file or folder '/no/such'"):
        Models.load("/no/such", saved.clip)
    with pytest.raises(CheckpointError, match="--dinov2 .* of type 'clip', not 'dinov2'"):
        Models.load(saved.clip, saved.clip)
    with pytest.raises(CheckpointError, match="no config.json"):
        Models.load(str(tmp_path), saved.clip)

    def unreachable(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="no network here.*download the files yourself and pass their folder"):
        Models.load("facebook/dinov2-base", saved.clip)


def test_weights_that_lack_a_tensor_are_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "dinov2"
    shutil.copytree(saved.dinov2, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors.*layernorm.weight"):
        Models.load(str(folder), saved.clip)


def test_weights_as_a_torch_file_load_too(saved, models, tmp_path):
    """The usual CLIP is published as `pytorch_model.bin` alone."""
    from safetensors.torch import load_file

    folder = tmp_path / "clip"
    shutil.copytree(saved.clip, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    again = Models.load(saved.dinov2, str(folder))
    assert torch.allclose(again.text("a fox").vector, models.text("a fox").vector, atol=ONE)


@pytest.mark.parametrize("missing", ["transformers", "PIL"])
def test_missing_packages_are_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'cfengine\[quality\]'"):
        Models.load()


def test_a_plot_is_asked_for_before_the_work(run, tmp_path, monkeypatch):
    still = film(tmp_path / "still.mp4", [flat(100)] * 8)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, out, err = run(still, "--at", "1", "--plot", str(tmp_path / "a.png"))
    assert code == 1 and "pip install matplotlib" in err and not out


def test_a_plot_is_written(run, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    still = film(tmp_path / "still.mp4", [flat(100)] * 13)
    code, _, err = run(still, still, "--at", "1,2,60", "--plot", str(tmp_path / "a.png"), "--prompt", "grey")
    assert code == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG"), err
    code, _, err = run(still, "--at", "1", "--plot", str(tmp_path / "gone/a.png"))
    assert code == 1 and "cannot write" in err
