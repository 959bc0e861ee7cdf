"""Every published layout of DiT weights, written small and at random, loads to the same official state dict."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cfengine.config import ModelConfig
from cfengine.errors import CheckpointError
from cfengine.model.layouts import merge_lora
from cfengine.model.weights import HUB_FILES, expected_shapes, infer_config, load_dit

pytestmark = pytest.mark.cpu

SMALL = ModelConfig(dim=48, ffn_dim=80, heads=4, layers=2, text_dim=20, text_len=12, freq_dim=32)


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(SMALL).items()}


def same(loaded, state):
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


def shards(folder, stem, state):
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: state[name] for name in half}, folder / file)
    places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


def test_the_default_sizes_are_those_of_the_released_model():
    shapes = expected_shapes(ModelConfig())
    assert len(shapes) == 825
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_418_996_800
    assert shapes["blocks.29.ffn.0.weight"] == (8960, 1536)
    assert shapes["head.head.weight"] == (64, 1536)


def test_context_forcing_takes_the_ema_unless_told_otherwise(state, tmp_path):
    file = tmp_path / "model.pt"
    ema = prefixed(state, "model._fsdp_wrapped_module.")
    torch.save({"generator": prefixed(other(state), "model."), "generator_ema": ema}, file)
    same(load_dit(file, SMALL), state)
    same(load_dit(tmp_path, SMALL), state)
    same(load_dit(file, SMALL, variant="generator"), other(state))
    with pytest.raises(CheckpointError, match="no variant 'critic'; it holds generator, generator_ema"):
        load_dit(file, SMALL, variant="critic")


def test_wrappers_inside_a_name_are_deleted_too(state, tmp_path):
    inner = {name.replace(".", "._fsdp_wrapped_module.", 1): tensor for name, tensor in state.items()}
    torch.save({"generator": prefixed(inner, "model._fsdp_wrapped_module.")}, tmp_path / "model.pt")
    same(load_dit(tmp_path, SMALL), state)


def test_self_forcing(state, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"generator_ema": prefixed(state, "model.")}, tmp_path / "checkpoints" / "self_forcing_dmd.pt")
    same(load_dit(tmp_path, SMALL), state)


@pytest.mark.parametrize("sharded", [False, True])
def test_wan_folder_as_published(state, tmp_path, sharded):
    if sharded:
        shards(tmp_path, "diffusion_pytorch_model", state)
    else:
        save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    same(load_dit(tmp_path, SMALL), state)


def test_safetensors_are_preferred_to_a_pickle(state, tmp_path):
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save(other(state), tmp_path / "diffusion_pytorch_model.bin")
    same(load_dit(tmp_path, SMALL), state)


def test_dtype_is_applied(state, tmp_path):
    save_file(state, tmp_path / "x.safetensors")
    loaded = load_dit(tmp_path / "x.safetensors", SMALL, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in loaded.items())


# LongLive: two files, merged


def adapter(state, rank=4, prefix="base_model.model.", suffix=""):
    generator = torch.Generator().manual_seed(8)
    lora = {}
    for name, tensor in state.items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            stem = prefix + name.removesuffix(".weight")
            lora[f"{stem}.lora_A{suffix}.weight"] = torch.randn(rank, tensor.shape[1], generator=generator)
            lora[f"{stem}.lora_B{suffix}.weight"] = torch.randn(tensor.shape[0], rank, generator=generator)
    return lora


def merged_by_hand(state, lora, scale):
    merged = dict(state)
    for name in state:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in lora:
            a, b = lora[f"{stem}.lora_A.weight"].double(), lora[f"{stem}.lora_B.weight"].double()
            merged[name] = (state[name].double() + scale * (b @ a)).float()
    return merged


@pytest.mark.parametrize("nested", [False, True])
def test_longlive_merges_its_lora(state, tmp_path, nested):
    folder = tmp_path / "models"
    folder.mkdir()
    lora = adapter(state)
    torch.save({"generator": prefixed(state, "model.")}, folder / "longlive_base.pt")
    torch.save({"generator_lora": lora} if nested else lora, folder / "lora.pt")
    loaded = load_dit(tmp_path, SMALL)
    wanted = merged_by_hand(state, lora, 256 / 4)
    assert loaded.keys() == wanted.keys()
    for name in wanted:
        # float32 product of rank 4 against float64: 4 roundings of 2**-24 at values near 64 * 10
        torch.testing.assert_close(loaded[name], wanted[name], rtol=1e-6, atol=1e-3)
    assert not torch.equal(loaded["blocks.0.ffn.0.weight"], state["blocks.0.ffn.0.weight"])
    assert torch.equal(loaded["blocks.0.ffn.0.bias"], state["blocks.0.ffn.0.bias"])
    for half in ("longlive_base.pt", "lora.pt"):
        other_way = load_dit(folder / half, SMALL)
        assert torch.equal(other_way["blocks.1.ffn.2.weight"], loaded["blocks.1.ffn.2.weight"])


def test_lora_names_with_an_adapter_and_wrappers(state):
    plain = adapter(state)
    named = adapter(state, prefix="base_model.model.model._fsdp_wrapped_module.", suffix=".default")
    first, second = merge_lora(state, plain), merge_lora(state, named)
    assert all(torch.equal(first[name], second[name]) for name in state)


def test_bf16_weights_are_merged_in_float32(state):
    lora = adapter(state)
    low = {name: tensor.bfloat16() for name, tensor in state.items()}
    merged = merge_lora(low, lora)
    assert merged["blocks.0.self_attn.q.weight"].dtype == torch.float32


@pytest.mark.parametrize("present", ["longlive_base.pt", "lora.pt"])
def test_half_of_longlive_is_refused(state, tmp_path, present):
    torch.save({"generator": state} if present.startswith("long") else adapter(state), tmp_path / present)
    absent = "lora.pt" if present.startswith("long") else "longlive_base.pt"
    for source in (tmp_path, tmp_path / present):
        with pytest.raises(CheckpointError, match=f"{absent} is not beside it"):
            load_dit(source, SMALL)


def test_a_lora_that_does_not_fit_is_listed(state):
    lora = adapter(state)
    lora.pop("base_model.model.blocks.0.self_attn.q.lora_B.weight")
    lora["base_model.model.blocks.0.self_attn.k.lora_A.weight"] = torch.zeros(4, 7)
    lora["base_model.model.blocks.9.ffn.0.lora_A.weight"] = torch.zeros(4, 48)
    lora["base_model.model.blocks.9.ffn.0.lora_B.weight"] = torch.zeros(80, 4)
    with pytest.raises(CheckpointError) as error:
        merge_lora(state, lora)
    for part in ("self_attn.q has lora_A without", "A [4, 7]", "blocks.9.ffn.0.weight is not among"):
        assert part in str(error.value)


# configuration from shapes


def test_config_is_read_off_the_shapes(state, tmp_path):
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="dim 48.*128.*pass heads"):
        infer_config(tmp_path)
    assert infer_config(tmp_path, heads=4) == ModelConfig(**{**vars(SMALL), "text_len": 512})
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "text_len": 12}))
    assert infer_config(tmp_path) == SMALL


def test_config_of_something_else(tmp_path):
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a Wan"):
        infer_config(tmp_path / "x.safetensors")


# what is refused


def test_one_error_lists_everything_that_does_not_fit(state, tmp_path):
    state.pop("head.modulation")
    state["blocks.0.norm3.weight"] = torch.zeros(5)
    state["stowaway"] = torch.zeros(1)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_dit(tmp_path / "x.safetensors", SMALL)
    text = str(error.value)
    assert "1 missing: head.modulation" in text
    assert "1 unexpected: stowaway" in text
    assert "1 of another shape: blocks.0.norm3.weight is [5] and should be [48]" in text


def test_a_long_list_is_cut_and_counted(state, tmp_path):
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_dit(tmp_path / "x.safetensors", ModelConfig())
    text = str(error.value)
    assert "756 missing" in text and "and 748 more" in text
    assert "'dim': 48" in text and len(text) < 3000


def write_truncated(path, state):
    whole = path.with_name("whole" + path.suffix)
    (save_file if path.suffix == ".safetensors" else torch.save)(state, whole)
    path.write_bytes(whole.read_bytes()[:5000])


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pointer"])
def test_a_damaged_file(state, tmp_path, name, damage):
    path = tmp_path / name
    if damage == "truncated":
        write_truncated(path, state)
    else:
        path.write_bytes({"empty": b"", "text": b"no weights " * 50, "pointer": b"version https://git-lfs.x"}[damage])
    message = "git lfs pull" if damage == "pointer" else "truncated, corrupt or no checkpoint"
    with pytest.raises(CheckpointError, match=message):
        load_dit(path, SMALL)


class Runner:
    def __reduce__(self):
        return print, ("code in a pickle ran",)


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    torch.save({"generator": Runner()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        load_dit(tmp_path, SMALL)
    assert "ran" not in capsys.readouterr().out


def test_a_folder_with_nothing_usable_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"model\.pt.*transformer.*it holds notes\.txt"):
        load_dit(tmp_path, SMALL)


def test_a_missing_path():
    with pytest.raises(CheckpointError, match="no file or folder '/nowhere/model.pt'"):
        load_dit("/nowhere/model.pt", SMALL)


def test_an_absent_shard(state, tmp_path):
    files = shards(tmp_path, "diffusion_pytorch_model", state)
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"2 shards and 1 are absent: {files[1]}"):
        load_dit(tmp_path, SMALL)


def test_an_index_cannot_leave_its_folder(tmp_path):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_dit(tmp_path, SMALL)


# the hub


def test_only_the_needed_files_are_fetched(state, tmp_path, monkeypatch):
    asked = {}

    def download(repo, *, allow_patterns):
        asked[repo] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    same(load_dit("Wan-AI/Wan2.1-T2V-1.3B", SMALL), state)
    assert asked == {"Wan-AI/Wan2.1-T2V-1.3B": list(HUB_FILES["Wan-AI/Wan2.1-T2V-1.3B"])}
    assert not any("t5" in pattern or pattern == "*" for pattern in asked["Wan-AI/Wan2.1-T2V-1.3B"])


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def download(repo, **_):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="name resolution failed.*check the name and the network"):
        load_dit("owner/model", SMALL)


def test_a_repository_without_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "never made"))
    with pytest.raises(CheckpointError, match="'owner/model' has none of config.json"):
        load_dit("owner/model", SMALL)


def test_a_mistyped_file_is_not_sought_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no file or folder 'models/model.pt'"):
        load_dit("models/model.pt", SMALL)
