"""The baseline computes what the engine computes, and the bench reports it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cfengine.bench import cpu
from cfengine.bench.baseline import ReferenceMethod, chunk_flops
from cfengine.bench.length import make_engine
from cfengine.bench.synthetic import EngineRun, chunk_inputs, random_weights
from cfengine.bench.timing import difference
from cfengine.config import EngineConfig, MemoryConfig
from cfengine.errors import CFEngineError, ConfigError
from cfengine.testing.traces import dit_config, load_trace

pytestmark = pytest.mark.cpu

DATA = Path(__file__).resolve().parents[1] / "data"
MEMORIES = {
    "released": MemoryConfig(),
    "rolls": MemoryConfig(sink=2, slow=3, fast=4, rope_length=9),
    "short_rope": MemoryConfig(sink=1, slow=4, fast=4, rope_length=6),
    "uniform": MemoryConfig(policy="uniform", interval=6, sink=1, slow=3, fast=5, rope_length=9, keep=2),
}
# float32 sums in another order: about 4e-7 here; the recorded traces of the released code are held to the same 1e-4
LIMIT = 1e-4
CHUNKS = 11


def both(memory: MemoryConfig, engine_memory: MemoryConfig | None = None):
    """Baseline and engine on the same weights; the engine may be given another memory."""
    config = replace(cpu.QUICK, memory=memory)
    weights = random_weights(config.model)
    prompt = torch.randn(5, config.model.text_dim, generator=torch.Generator().manual_seed(3))
    baseline = ReferenceMethod(weights, config.model, memory, config.sampler, config.grid)
    engine = EngineRun(weights, replace(config, memory=engine_memory or memory), prompt)
    return config, prompt, baseline, engine


@torch.inference_mode()
def errors(config: EngineConfig, prompt, baseline: ReferenceMethod, engine: EngineRun) -> list[float]:
    """Largest relative error of the latents, chunk by chunk."""
    found = []
    for start in range(0, CHUNKS * config.memory.chunk_frames, config.memory.chunk_frames):
        noise, renoise = chunk_inputs(config, start)
        expected = baseline.chunk(noise, renoise, prompt, start)
        found.append(difference(engine.chunk(noise, renoise, start), expected)[0])
    return found


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_baseline_equals_engine(memory):
    config, prompt, baseline, engine = both(memory)
    assert max(errors(config, prompt, baseline, engine)) <= LIMIT
    promoted = [cache.promoted for cache in baseline.layers]
    assert promoted == [int(table.promoted) for table in engine.memory.tables.layers] and min(promoted) > 0
    for cache, table in zip(baseline.layers, engine.memory.tables.layers, strict=True):
        assert cache.sources == table.sources.tolist()


@torch.inference_mode()
def test_baseline_equals_a_trace_of_the_released_code():
    trace = load_trace(DATA / "dit_cf_roll.safetensors")
    config, frames = dit_config(trace), trace.value("chunk_frames")
    weights = {name.removeprefix("model."): t for name, t in trace.tensors.items() if name.startswith("model.")}
    baseline = ReferenceMethod(weights, config.model, config.memory, config.sampler, config.grid)
    noise, renoise = trace.tensor("in.noise").split(frames), trace.tensor("in.renoise")
    passes = []
    for index, start in enumerate(range(0, trace.value("frames"), frames)):
        prompt = trace.tensor("in.prompt_embeds")[0]
        latents = baseline.chunk(noise[index], renoise[index], prompt, start, passes)
        assert difference(latents, trace.tensor("out.latents")[start : start + frames])[0] <= LIMIT
        for cache, expected in zip(baseline.layers, trace.value("steps")[len(passes) - 1]["layers"], strict=True):
            assert cache.sources == expected["token_source_frame"]
            assert cache.end.item() == expected["local_end_index"]
    actions = {layer["action"] for step in trace.value("steps") for layer in step["layers"]}
    assert actions == {"none", "fill", "roll"}
    for part, name in enumerate(("out.flow_pred", "out.x0")):
        assert difference(torch.stack([step[part] for step in passes]), trace.tensor(name))[0] <= LIMIT


def test_another_rule_is_noticed():
    config, prompt, baseline, engine = both(MemoryConfig(), MemoryConfig(threshold=-2.0))
    found = errors(config, prompt, baseline, engine)
    assert found[0] <= LIMIT and max(found) > 100 * LIMIT


def test_baseline_refuses_other_policies():
    config = replace(cpu.QUICK, memory=MemoryConfig(policy="fifo", sink=0, slow=0, fast=21))
    with pytest.raises(ConfigError, match="'fifo'.*'slow_fast'"):
        ReferenceMethod(random_weights(config.model), config.model, config.memory, config.sampler, config.grid)


def test_flops_of_a_chunk():
    config = cpu.QUICK
    flops = chunk_flops(config.model, config.memory, config.page_tokens)
    tokens, keys, dim, layers, passes = 36, 252, 64, 2, 5  # 3 frames of 12 tokens against 21
    assert flops["attention"] == passes * layers * 2 * (2 * tokens * keys * dim)
    per_layer = 2 * tokens * (6 * dim * dim + 2 * dim * 128)
    assert flops["linear"] == passes * (layers * per_layer + 2 * tokens * dim * (64 + 64))


def test_quick_run_writes_records(tmp_path, capsys):
    path = tmp_path / "records.json"
    assert cpu.main(["--quick", "--threads", "1", "--json", str(path)]) == 0
    records = {record["name"]: record for record in json.loads(path.read_text())}
    assert set(records) == {
        "engine_vs_baseline_chunk_fp32",
        "engine_vs_baseline_chunk_bf16",
        "baseline_over_gemm_bound",
        "attention_share_of_gemm_fp32",
        "attention_share_of_gemm_bf16",
    }
    for record in records.values():
        assert set(record) == {"name", "value", "unit", "baseline", "ratio", "config", "device", "commit", "software"}
        assert record["value"] > 0 and record["ratio"] > 0
        assert record["config"]["page_tokens"] == 12 and record["config"]["slots"] == 21
    assert 0 < records["engine_vs_baseline_chunk_bf16"]["config"]["errors"]["bfloat16_rms"] < cpu.BFLOAT16_LIMIT
    shown = capsys.readouterr().out
    assert "paged_attention" in shown and "attention_share_of_gemm_bf16" in shown


def test_wrong_latents_are_not_timed(monkeypatch):
    contest = cpu.Contest(cpu.QUICK)
    right = contest.engines[torch.float32].chunk
    monkeypatch.setattr(contest.engines[torch.float32], "chunk", lambda *inputs: right(*inputs) * 1.001)
    with torch.inference_mode(), pytest.raises(CFEngineError, match="no speed is reported"):
        contest.fill(lambda text: None)


def test_missing_folder_is_named_before_any_work(tmp_path, capsys):
    assert cpu.main(["--quick", "--threads", "1", "--json", str(tmp_path / "gone" / "records.json")]) == 1
    shown = capsys.readouterr()
    assert "gone" in shown.err and "checked frames" not in shown.out


def test_stream_is_timed_with_a_full_memory():
    with make_engine(cpu.QUICK) as engine:
        found = cpu.stream_record(engine, seconds=3)
    shape = found["config"]
    assert found["name"] == "tiny_world_fps" and found["unit"] == "frames/s" and found["value"] > 0
    assert shape["memory_full"] and shape["slots_in_use"] == 21 and shape["chunks_before"] == 7
    assert shape["chunks"] == 4 and shape["frames_per_chunk"] == 12  # 48 frames at 16 a second
    assert shape["slowest_chunk_seconds"] >= 12 / found["value"]
