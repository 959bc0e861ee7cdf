"""The arithmetic of a chunk, against numbers counted by hand for 832x480."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cfengine.bench import cpu
from cfengine.bench.baseline import chunk_flops
from cfengine.bench.ceilings import Ceilings
from cfengine.bench.roofline import TERMS, floor
from cfengine.bench.work import chunk_work, pass_work, products, sizes, taehv_work
from cfengine.config import preset

pytestmark = pytest.mark.cpu

FULL = preset("context-forcing")
TOKENS, KEYS, DIM, FFN, LAYERS = 4680, 32760, 1536, 8960, 30


def test_tokens_and_keys_of_a_full_memory():
    size = sizes(FULL)
    assert (size.tokens, size.keys, size.text) == (TOKENS, KEYS, 512)
    assert sizes(FULL, slots=3).keys == TOKENS


def test_a_denoise_pass_by_hand():
    work = pass_work(FULL, sizes(FULL))
    block = 6 * DIM * DIM + 2 * DIM * FFN  # q, k, v, o and the two of the cross-attention; the feed-forward
    ends = 2 * 64 * DIM  # patches of 2 x 2 x 16 in and out
    assert work.linear == 2 * TOKENS * (LAYERS * block + ends)
    assert work.attention == 4 * TOKENS * KEYS * DIM * LAYERS
    assert work.cross == 4 * TOKENS * 512 * DIM * LAYERS
    assert work.weights == 2 * (LAYERS * block + ends)
    assert work.pages == 2 * 2 * KEYS * DIM * LAYERS
    # a block: 6 activations around the pages, 4 around each of three gates, 2 around the query of the prompt; and the
    # first norm of the pass
    assert work.elements == 2 * TOKENS * DIM * (LAYERS * (6 + 12 + 2) + 2)
    assert work.flops == pytest.approx(40.41e12, rel=1e-3)


def test_a_clean_pass_stops_at_the_last_keys():
    size = sizes(FULL)
    full, clean = pass_work(FULL, size), pass_work(FULL, size, clean=True)
    saved = (4 * DIM * DIM + 2 * DIM * FFN) + 64 * DIM  # of the last block all but k and v; the head
    assert full.linear - clean.linear == 2 * TOKENS * saved
    assert full.attention - clean.attention == 4 * TOKENS * KEYS * DIM
    assert products(FULL, keys_only=True) == {"kv": (DIM, 2 * DIM)}


def test_a_chunk_is_200_teraflop():
    work = chunk_work(FULL, sizes(FULL))
    assert work.flops == pytest.approx(200.73e12, rel=1e-4)
    assert work.linear == pytest.approx(58.18e12, rel=1e-3)
    assert work.attention == pytest.approx(140.35e12, rel=1e-3)


def test_fp8_moves_fewer_bytes_and_does_the_same_arithmetic():
    wide, narrow = (pass_work(FULL, sizes(FULL, precision=kind)) for kind in ("bf16", "fp8"))
    assert wide.flops == narrow.flops
    assert narrow.pages == wide.pages / 2
    assert narrow.elements < wide.elements


def test_the_baseline_counts_the_same_passes():
    config = cpu.QUICK
    flops = chunk_flops(config.model, config.memory, config.page_tokens, passes=1)
    work = pass_work(config, sizes(config))
    assert (work.linear, work.attention, work.cross) == (flops["linear"], flops["attention"], flops["cross"])


def test_taehv_is_counted_on_its_modules():
    flops, traffic = taehv_work(FULL)
    height, width = 60, 104
    first = 2 * 3 * height * width * 16 * 256 * 9  # the first convolution alone
    assert flops > first
    assert flops == pytest.approx(1.632e12, rel=1e-3)  # 35 convolutions over 3 latent frames, added up by hand
    assert traffic == pytest.approx(5.608e9, rel=1e-3)
    half = replace(FULL, video=replace(FULL.video, width=416))
    assert taehv_work(half)[0] == flops / 2


def test_floor_divides_work_by_ceilings():
    ceilings = Ceilings(bandwidth=4e12, gemm={"fp32": 5e13, "bf16": 8e14, "fp8": 1.6e15})
    bf16, fp8 = (floor(FULL, kind, ceilings) for kind in ("bf16", "fp8"))
    work = chunk_work(FULL, sizes(FULL))
    assert tuple(bf16) == TERMS
    assert bf16["linear"] == pytest.approx(work.linear / 8e14)
    assert bf16["attention"] == pytest.approx(work.attention / 8e14)
    assert bf16["element-wise"] == pytest.approx(work.elements / 4e12)
    assert fp8["attention"] == pytest.approx(bf16["attention"] / 2)
    assert fp8["cross"] == bf16["cross"]  # stays in bfloat16
    assert bf16["gaps and rest"] == 0


def test_a_precision_without_its_own_products_counts_as_bfloat16():
    ceilings = Ceilings(bandwidth=1.0, gemm={"bf16": 2.0})
    assert ceilings.rate("fp8") == 2.0
