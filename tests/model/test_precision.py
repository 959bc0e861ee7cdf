"""A model in e4m3 on the CPU: which products are rounded, what it costs, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cfengine.config import PRECISIONS, PRODUCTS, EngineConfig, Kept, PrecisionConfig, precision
from cfengine.errors import ConfigError
from cfengine.memory.pages import PagePool

pytestmark = pytest.mark.cpu
FP8 = PRECISIONS["fp8"]


@pytest.fixture
def in_precision(toy_engine):
    """in_precision(PrecisionConfig) -> engine of the same random weights in that precision."""

    def make(some: PrecisionConfig):
        engine = toy_engine()
        return toy_engine(dataclasses.replace(engine.config, precision=some))

    return make


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"linears": "int8"}, ["linears is 'int8'", "'bf16' or 'fp8'"]),
        ({"attention": "fp8"}, ["pages in fp8", "PrecisionConfig.pages"]),
        ({"linears": "fp8", "keep": (Kept("blocks.*.ffn.1", "a typo"),)}, ["'blocks.*.ffn.1'", "ffn.0"]),
        ({"linears": "fp8", "keep": (Kept("head", "not of a block"),)}, ["'head'", "blocks.<number>"]),
        ({"linears": "fp8", "keep": (Kept("blocks.30.*", "one too many"),)}, ["'blocks.30.*'", "30 blocks"]),
    ],
)
def test_bad_precision(arguments, words):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(name="any", precision=PrecisionConfig(**arguments))
    for word in words:
        assert word in str(caught.value)


def test_unknown_name():
    with pytest.raises(ConfigError, match="unknown precision 'fp4'; choose one of bf16, fp8"):
        precision("fp4")


def test_kept_products():
    kept = (Kept("blocks.*.ffn.2", "its input has outliers"), Kept("blocks.7.self_attn.*", "the last block"))
    some = PrecisionConfig(linears="fp8", keep=kept)
    assert some.fp8_products(0) == frozenset(PRODUCTS) - {"ffn.2"}
    assert some.fp8_products(7) == frozenset(PRODUCTS) - {"ffn.2", "self_attn.qkv", "self_attn.o"}
    EngineConfig(name="any", precision=PrecisionConfig(linears="fp8", keep=(Kept("blocks.2[0-9].*", "the last ten"),)))
    assert not PrecisionConfig().fp8_products(0) and not PrecisionConfig().fp8


def test_weights_are_rounded_once_and_let_go(in_precision):
    kept = PrecisionConfig(linears="fp8", keep=(Kept("blocks.1.*", "for the test"),))
    wide, model = in_precision(PrecisionConfig()).model, in_precision(kept).model
    for name in PRODUCTS:
        weight, scale, bias = model.blocks[0].products[name]
        expected = wide.blocks[0].products[name]
        assert weight.dtype == torch.float8_e4m3fn and scale.shape == bias.shape
        assert (
            float((weight.float() * scale[:, None] - expected.weight).abs().max() / expected.weight.abs().max()) < 2**-4
        )
        assert torch.equal(bias, expected.bias)
        assert model.blocks[1].products[name].scale is None
    assert model.blocks[0].ffn[0].weight.numel() == 0 and model.blocks[1].ffn[0].weight.numel() > 0
    assert model.blocks[1].fp8_after is False and model.blocks[0].fp8_after is False  # block 1 reads a wide norm


def test_pages_take_half_the_memory_of_bfloat16(toy_engine):
    plain = toy_engine().config
    config = dataclasses.replace(plain, precision=FP8)
    wide, narrow = PagePool(plain, torch.bfloat16), PagePool(config, torch.bfloat16)
    assert narrow.k.shape == narrow.v.shape == wide.k.shape
    assert narrow.v.stride(2) == 1 and narrow.v.stride(4) % 32 == 0  # tokens side by side
    padding = narrow.v.stride(4) / config.page_tokens
    scales = narrow.k_scale.nbytes + narrow.v_scale.nbytes
    assert narrow.bytes == wide.bytes / 4 * (1 + padding) + scales
    assert PagePool(plain, torch.float32).scales(0) == {}


@pytest.mark.parametrize(
    "some",
    [
        PrecisionConfig(linears="fp8"),
        PrecisionConfig(linears="fp8", keep=(Kept("blocks.*.self_attn.qkv", "mixed"), Kept("blocks.0.ffn.0", "mixed"))),
        PrecisionConfig(pages="fp8"),
        FP8,
    ],
)
def test_a_stream_stays_near(in_precision, some):
    """Every part runs through the engine, and a chunk of random weights moves by a few percent, not by more."""
    latents = []
    for engine in (in_precision(PrecisionConfig()), in_precision(some)):
        with engine.session("a b c", seed=3) as session:
            session.next_chunk()
            session.next_chunk()
            latents.append(session.latents)
    error = float((latents[1] - latents[0]).square().mean().sqrt() / latents[0].std())
    assert 1e-4 < error < 0.15


def test_keys_only_in_e4m3(in_precision):
    """The clean pass of the last block takes the lower part of the fused product, scales and bias with it."""
    engine = in_precision(FP8)
    ops, block = engine.ops, engine.model.blocks[0]
    normed = ops.quantise_rows(torch.randn(10, engine.config.model.dim))
    q, k, v = block.pre_attention(ops, normed)
    nothing, k_alone, v_alone = block.pre_attention(ops, normed, keys_only=True)
    assert nothing is None
    torch.testing.assert_close(k_alone, k, rtol=1e-6, atol=1e-6)  # the same products, summed in another order at most
    torch.testing.assert_close(v_alone, v, rtol=1e-6, atol=1e-6)
