"""The diffusers layout, and the first chunk against `diffusers.WanTransformer3DModel` on the same weights.

The first chunk attends to itself alone and all its frames share one timestep, so a full-attention Wan and a causal one
compute the same thing.
"""

import json

import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass
from cfengine.model.dit import CausalDiT
from cfengine.model.layouts import from_diffusers
from cfengine.model.weights import expected_shapes, infer_config, load_dit
from cfengine.ops import select
from cfengine.segments.torch import TorchSegments
from cfengine.segments.walk import walk

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.cpu

SMALL = ModelConfig(dim=48, ffn_dim=80, heads=4, layers=2, text_dim=20, text_len=12, freq_dim=32)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(3)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=SMALL.heads,
        attention_head_dim=SMALL.head_dim,
        ffn_dim=SMALL.ffn_dim,
        num_layers=SMALL.layers,
        text_dim=SMALL.text_dim,
        freq_dim=SMALL.freq_dim,
    ).eval()
    with torch.no_grad():
        for (
            name,
            weight,
        ) in model.named_parameters():  # norms start as ones and biases near zero: make every tensor tell
            weight.copy_(torch.randn_like(weight) / (weight[0].numel() ** 0.5 if weight.ndim > 1 else 4))
            weight.add_(float("norm" in name and name.endswith("weight")))
    return model.requires_grad_(False)


def test_every_name_is_translated(transformer):
    state = transformer.state_dict()
    translated = {from_diffusers(name): tuple(tensor.shape) for name, tensor in state.items()}
    assert translated == expected_shapes(SMALL) and len(translated) == len(state)


@pytest.mark.parametrize("place", ["transformer", "."])
@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_folders_load_whole_and_sharded(transformer, tmp_path, place, size):
    transformer.save_pretrained(tmp_path / place, max_shard_size=size)
    shards = len(list((tmp_path / place).glob("*.safetensors")))
    assert shards == 1 if size == "1GB" else shards > 2
    loaded = load_dit(tmp_path, SMALL)
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(loaded[from_diffusers(name)], tensor), name
    assert vars(infer_config(tmp_path)) == vars(SMALL) | {"text_len": 512}  # heads from its config.json


def test_the_configuration_beside_the_weights_is_read(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 2}))
    assert infer_config(tmp_path).heads == 2


@pytest.mark.parametrize("timestep, live", [(1000.0, 12), (625.0, 5), (0.0, 1)])
def test_the_first_chunk_equals_diffusers(transformer, tmp_path, timestep, live):
    transformer.save_pretrained(tmp_path)
    config = EngineConfig(name="x", model=SMALL, memory=MemoryConfig(), video=VideoConfig(width=96, height=64))
    model = CausalDiT(SMALL)
    model.load_state_dict(load_dit(tmp_path, SMALL))
    model.prepare()
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(3, 16, 8, 12, generator=generator)
    prompt = torch.zeros(12, 20)
    prompt[:live] = torch.randn(live, 20, generator=generator)
    with torch.inference_mode():
        wanted = transformer(latents.transpose(0, 1)[None], torch.tensor([timestep]), prompt[None], return_dict=False)[
            0
        ][0].transpose(0, 1)
        ops = select("cpu", prefer="reference")
        found = walk(
            TorchSegments(model, ops, config.grid),
            Memory(config, ops, torch.float32),
            latents,
            Pass(0),
            model.modulate(timestep),
            model.project_text(prompt[:live]),
        )
    # diffusers takes the sines of the timestep in float32: angles up to 1000 are off by 3e-5
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error < 2e-5, f"relative error {error:.2e}"
