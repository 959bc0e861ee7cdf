"""The window rule in Triton against the Python rule and against the recorded traces, integer for integer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cfengine.errors import KernelError
from cfengine.kernels.slow_fast_update.cases import empty_table
from cfengine.kernels.slow_fast_update.reference import SlowFastTable
from cfengine.kernels.window_update.cases import RULES, passes, rule
from cfengine.kernels.window_update.reference import WindowRule
from cfengine.kernels.window_update.reference import window_update as reference
from cfengine.memory.pages import Tables
from cfengine.memory.policies import Pass, make_policy
from cfengine.ops import select
from cfengine.scheduler.scenes import timeline
from cfengine.testing.traces import dit_config, load_trace

pytest.importorskip("triton", reason="pip install triton")
from cfengine.kernels.window_update.triton import window_update  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DATA = Path(__file__).parents[1] / "data"
pytestmark = [pytest.mark.gpu if GPU else pytest.mark.cpu]


def flush(table: SlowFastTable, ends: torch.Tensor) -> None:
    for row in (table.page_ids, table.sources):
        row[1:3] = row[-2:].clone()
    ends.fill_(3)
    table.count.fill_(3)


def compare(rules: WindowRule, chunks: int, seed: int) -> int:
    """Drive both with the same passes; return how many of them shifted the window."""
    found, expected = SlowFastTable(*(t.to(DEVICE) for t in empty_table(rules, 4))), empty_table(rules, 4)
    ends, expected_end = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(1, dtype=torch.int32)
    shifts = 0
    for start, opens, cut in passes(rules, chunks, seed):
        if opens:
            flush(found, ends)
            flush(expected, expected_end)
        where = [torch.tensor([value], dtype=torch.int32, device=DEVICE) for value in (start, cut)]
        window_update(found, ends, where[0], rules, cut=where[1])
        reference(expected, expected_end, start, rules, cut=cut)
        assert torch.equal(ends.cpu(), expected_end)
        for name, ours, theirs in zip(SlowFastTable._fields, found, expected, strict=True):
            ours = ours.cpu()
            assert torch.equal(ours, theirs), f"{name} at frame {start}: {ours.tolist()} != {theirs.tolist()}"
        shifts += int(expected.decision[4])
    return shifts


@pytest.mark.parametrize("rules", RULES)
def test_matches_the_python_rule(rules):
    assert compare(rules, 7, seed=0)  # the plan fills the window


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))  # no hypothesis: on a GPU this runs without it
@pytest.mark.parametrize("kind", ["sf", "ll", "lli", "ir"])
def test_random_rules(kind, seed):
    chunk, sink, extra = map(int, np.random.default_rng(seed).integers((1, 0, 0), (5, 5, 10)))
    chunk = max(chunk, 3) if kind == "ir" else chunk
    compare(rule(kind, slots=max(chunk + extra, 3, sink), sink=sink, chunk_frames=chunk), 6, seed)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["dit_sf", "dit_longlive", "dit_infrope"])
def test_recorded_tables(stem):
    """The two end indices that every pass of a recorded video leaves in every layer."""
    trace = load_trace(DATA / f"{stem}.safetensors")
    config = dit_config(trace)
    memory, steps = config.memory, trace.value("steps")
    tables, policy = Tables(config, DEVICE), make_policy(memory, select("cuda", {"window_update": "triton"}))
    scenes, passes_per_chunk = timeline(trace.meta.get("prompt") or "-", config), len(config.sampler.steps) + 1
    key_mean = torch.zeros(config.model.dim, device=DEVICE)
    for i, step in enumerate(steps):
        number, within = divmod(i, passes_per_chunk)
        scene, opens = scenes.at(number)
        if opens and not within:
            policy.flush(tables)
        cut = opens and scenes.scenes[scene].cut
        for layer, recorded in enumerate(step["layers"]):
            policy.update(tables, layer, key_mean, Pass(number * memory.chunk_frames, cut=cut))
            ends = int(tables.ends[layer]), int(tables.layers[layer].seen)
            tokens = config.page_tokens
            assert tuple(end * tokens for end in ends) == (recorded["local_end_index"], recorded["global_end_index"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table, ends: (table._replace(page_ids=table.page_ids[:-1]), ends), ["length of page_ids is 8", "9"]),
        (lambda table, ends: (table, ends.long()), ["ends is int64", "int32"]),
        (lambda table, ends: (table, ends.repeat(2)), ["length of ends is 2", "1"]),
    ],
)
def test_bad_operands(change, words):
    table = SlowFastTable(*(t.to(DEVICE) for t in empty_table(RULES[0], 4)))
    table, ends = change(table, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    with pytest.raises(KernelError) as caught:
        window_update(table, ends, 0, RULES[0])
    for word in ("window_update", *words):
        assert word in str(caught.value)
