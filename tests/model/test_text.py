"""UMT5 in its published layouts, the cleaning of prompts, and the cache of embeddings."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfengine.errors import CheckpointError, ConfigError, PromptError
from cfengine.model.text import HUB_FILES, CachedTextEncoder, UMT5Encoder, clean, from_official, identity_of

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")
pytestmark = pytest.mark.cpu

PROMPT = "a quiet harbour at dawn, boats rocking"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=40, d_model=24, d_kv=5, d_ff=36, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = transformers.UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # norms start as ones: make every tensor tell
            weight.copy_(torch.randn_like(weight) * 0.3 + ("norm" in name))
    return model


def write_tokenizer(folder):
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz,&"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -3.0), *letters]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    unigram.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, **names).save_pretrained(folder)


# `wan/modules/t5.py` of Wan-Video/Wan2.1, written out for one block
OFFICIAL = {
    "token_embedding.weight": "encoder.embed_tokens.weight",
    "blocks.1.norm1.weight": "encoder.block.1.layer.0.layer_norm.weight",
    "blocks.1.attn.q.weight": "encoder.block.1.layer.0.SelfAttention.q.weight",
    "blocks.1.attn.k.weight": "encoder.block.1.layer.0.SelfAttention.k.weight",
    "blocks.1.attn.v.weight": "encoder.block.1.layer.0.SelfAttention.v.weight",
    "blocks.1.attn.o.weight": "encoder.block.1.layer.0.SelfAttention.o.weight",
    "blocks.1.pos_embedding.embedding.weight": "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    "blocks.1.norm2.weight": "encoder.block.1.layer.1.layer_norm.weight",
    "blocks.1.ffn.gate.0.weight": "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
    "blocks.1.ffn.fc1.weight": "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
    "blocks.1.ffn.fc2.weight": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}


def official_state(model):
    state = model.state_dict()
    names = OFFICIAL | {
        old.replace(".1.", ".0.", 1): new.replace("block.1.", "block.0.") for old, new in OFFICIAL.items()
    }
    return {old: state[new].clone() for old, new in names.items()}


@pytest.fixture(scope="module")
def official(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    torch.save(official_state(model), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture(scope="module")
def hub(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_official_names():
    assert {name: from_official(name) for name in OFFICIAL} == OFFICIAL
    assert from_official("blocks.0.something.weight") == "blocks.0.something.weight"


@pytest.mark.parametrize("layout", ["official", "hub", "plain"])
def test_every_layout_gives_the_same_embedding(model, layout, request):
    encoder = UMT5Encoder.from_pretrained(request.getfixturevalue(layout), dtype=torch.float32)
    found = encoder.encode(PROMPT)
    assert (encoder.text_dim, encoder.text_len) == (24, 512)
    ids = encoder.tokenizer(PROMPT)["input_ids"]
    assert ids[-1] == 1 and 2 not in ids  # closed with </s>, every letter known
    # as Wan calls it: padded to text_len and masked, then cut to the live rows
    padded = torch.zeros(1, 64, dtype=torch.long)
    padded[0, : len(ids)] = torch.tensor(ids)
    mask = (torch.arange(64) < len(ids)).long()[None]
    with torch.no_grad():
        wanted = model(input_ids=padded, attention_mask=mask).last_hidden_state[0, : len(ids)]
    # masked keys weigh exactly zero; float32 sums of another length may differ in order
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())
    assert found.shape == (len(ids), 24)


def test_the_token_table_is_held_once(official):
    model = UMT5Encoder.from_pretrained(official, dtype=torch.float32).model
    assert model.shared is model.encoder.embed_tokens


def test_dtype(official):
    assert UMT5Encoder.from_pretrained(official).encode(PROMPT).dtype == torch.bfloat16


def test_a_whole_umt5_gives_its_encoder(model, hub, tmp_path):
    state = load_file(hub / "text_encoder" / "model.safetensors")
    state |= {"decoder.final_layer_norm.weight": torch.ones(24), "lm_head.weight": torch.ones(40, 24)}
    save_file(state, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    same = UMT5Encoder.from_pretrained(hub).encode(PROMPT)
    assert torch.equal(UMT5Encoder.from_pretrained(tmp_path).encode(PROMPT), same)


def test_a_long_prompt_is_refused_with_both_numbers(official):
    encoder = UMT5Encoder.from_pretrained(official, text_len=20)
    assert encoder.encode("a" * 18).shape[0] == 20  # blank mark, 18 letters, </s>
    with pytest.raises(PromptError, match="21 tokens and the model reads 20"):
        encoder.encode("a" * 19)


@pytest.mark.parametrize("prompt", ["", "  \n\t ", "&nbsp;"])
def test_an_empty_prompt_is_refused(official, prompt):
    with pytest.raises(PromptError, match="empty"):
        UMT5Encoder.from_pretrained(official).encode(prompt)


def test_prompts_are_cleaned():
    assert clean("  a \n quiet\u3000harbour ") == "a quiet harbour"
    assert clean("salt &amp;amp; fog") == "salt & fog"
    assert clean("it\u00e2\u20ac\u2122s dawn") == "it's dawn"  # an apostrophe that was decoded as Windows-1252


def test_what_does_not_fit_is_listed(model, tmp_path):
    state = official_state(model)
    state.pop("blocks.1.attn.k.weight")
    state["blocks.0.ffn.fc2.weight"] = torch.zeros(24, 35)
    state["stowaway"] = torch.zeros(1)
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(tmp_path / "google" / "umt5-xxl")
    with pytest.raises(CheckpointError) as error:
        UMT5Encoder.from_pretrained(tmp_path)
    for part in ("block.1.layer.0.SelfAttention.k.weight", "stowaway", "should be [35, 24]"):
        assert part in str(error.value)


def test_what_is_absent_is_named(model, tmp_path):
    with pytest.raises(CheckpointError, match="models_t5_umt5-xxl-enc-bf16.pth, text_encoder/model.safetensors"):
        UMT5Encoder.from_pretrained(tmp_path)
    torch.save(official_state(model), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(CheckpointError, match="no tokenizer .*google/umt5-xxl"):
        UMT5Encoder.from_pretrained(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not usable"):
        UMT5Encoder.from_pretrained(tmp_path)


def test_hub_fetches_no_other_weights():
    assert not any(pattern.startswith(("*", "diffusion", "transformer")) for pattern in HUB_FILES)


# the cache


class Counting:
    """An encoder that can be recognised: rows of the prompt's length, and a count of its calls."""

    text_dim, text_len = 3, 8

    def __init__(self):
        self.calls = 0

    def encode(self, prompt):
        self.calls += 1
        return torch.full((len(prompt.split()), 3), float(len(prompt)), dtype=torch.bfloat16)


def cached(folder, encoder=None, identity="counting", text_len=8):
    def refuse():
        raise AssertionError("the encoder was loaded though the prompt is cached")

    factory = (lambda: encoder) if encoder else refuse
    return CachedTextEncoder(factory, folder, identity=identity, text_dim=3, text_len=text_len)


def test_a_prompt_is_encoded_once(tmp_path):
    encoder = Counting()
    first = cached(tmp_path / "new" / "folder", encoder)
    made = first.encode("two words")
    assert torch.equal(first.encode("two words"), made) and encoder.calls == 1
    assert torch.equal(cached(tmp_path / "new" / "folder").encode("  two\nwords "), made)  # cleaned, then hashed
    assert made.shape == (2, 3) and made.dtype == torch.bfloat16
    first.encode("other words")
    assert encoder.calls == 2


def test_the_encoder_is_made_at_most_once(tmp_path):
    made = []
    cache = CachedTextEncoder(lambda: made.append(1) or Counting(), tmp_path, identity="x", text_dim=3)
    assert not made
    cache.encode("one")
    cache.encode("two")
    assert len(made) == 1


def test_encoders_do_not_share_entries(tmp_path):
    cached(tmp_path, Counting(), identity="one").encode("word")
    other = Counting()
    cached(tmp_path, other, identity="two").encode("word")
    assert other.calls == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "width"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    cache = cached(tmp_path, Counting())
    made = cache.encode("two words")
    path = cache.path_of("two words")
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:-3]}.get(damage, whole))
    if damage == "other":
        save_file({"else": torch.zeros(2, 3)}, path)
    if damage == "width":
        save_file({"embedding": torch.zeros(2, 4)}, path)
    again = Counting()
    assert torch.equal(cached(tmp_path, again).encode("two words"), made)
    assert again.calls == 1 and path.read_bytes() == whole


def test_an_entry_longer_than_the_limit_goes_back_to_the_encoder(tmp_path):
    cached(tmp_path, Counting()).encode("one two three")
    encoder = Counting()
    cached(tmp_path, encoder, text_len=2).encode("one two three")
    assert encoder.calls == 1


def test_nothing_partial_is_left(tmp_path):
    cached(tmp_path, Counting()).encode("two words")
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_folder_that_cannot_be_written_warns_and_goes_on(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.warns(UserWarning, match="CFENGINE_CACHE_DIR"):
        assert cached(blocker / "cache", Counting()).encode("two words").shape == (2, 3)


def test_refusals_come_before_the_encoder_is_loaded(tmp_path):
    with pytest.raises(PromptError, match="empty"):
        cached(tmp_path).encode(" ")


def test_an_encoder_of_another_width(tmp_path):
    cache = CachedTextEncoder(Counting, tmp_path, identity="x", text_dim=4)
    with pytest.raises(ConfigError, match="rows of 3 and the model takes 4"):
        cache.encode("word")
    assert not list(tmp_path.iterdir())


def test_writers_share_a_folder(tmp_path):
    caches = [cached(tmp_path, Counting()) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda cache: cache.encode("two words"), caches))
    assert all(torch.equal(cached(tmp_path).encode("two words"), one) for one in made)
    assert len(list(tmp_path.iterdir())) == 1


def test_identity_changes_with_the_files(official, tmp_path):
    assert identity_of("owner/name") == "owner/name"
    before = identity_of(official)
    assert before == identity_of(official)
    file = official / "google" / "umt5-xxl" / "tokenizer.json"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert identity_of(official) != before


def test_umt5_behind_the_cache(official, tmp_path):
    cache = CachedTextEncoder.umt5(official, tmp_path, dtype=torch.float32, text_dim=24)
    made = cache.encode(PROMPT)
    assert torch.equal(made, UMT5Encoder.from_pretrained(official, dtype=torch.float32).encode(PROMPT))
    later = CachedTextEncoder.umt5(official, tmp_path, dtype=torch.float32, text_dim=24)
    assert torch.equal(later.encode(PROMPT), made) and later._encoder is None
