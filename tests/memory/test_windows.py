"""Window rules against a cache written the plain way: keys stored with or without their rotation, clones, slices.

The reference below follows the order of operations of the public codes (Self-Forcing, LongLive v1.0 and its infinity
file, Infinity-RoPE), with one dense attention over what they would attend to, in float64.
"""

from __future__ import annotations

import pytest
import torch

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.kernels.rope import axis_frequencies, axis_pairs, rotate, spatial_table
from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass
from cfengine.ops import select

pytestmark = pytest.mark.cpu

ROWS, COLUMNS, HEADS, HEAD_DIM = 2, 3, 2, 22
PAGE = ROWS * COLUMNS


def roped(x: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """(frames, PAGE, HEADS, HEAD_DIM) with all three rotations at the given temporal positions."""
    pairs = axis_pairs(HEAD_DIM)[0]
    table = spatial_table(ROWS, COLUMNS, HEAD_DIM).double()
    x = rotate(x, torch.atan2(table[..., 1], table[..., 0])[:, None], pairs)
    angle = torch.tensor(positions, dtype=torch.float64)[:, None] * axis_frequencies(pairs)
    return rotate(x, angle[:, None, None], 0)


class Plain:
    """A cache of `window` raw frames per the rule `kind`: sf, ll, lli or ir."""

    def __init__(self, kind: str, window: int, sink: int, chunk: int) -> None:
        self.kind, self.window, self.sink, self.chunk = kind, window, sink, chunk
        self.k = torch.zeros(window, PAGE, HEADS, HEAD_DIM, dtype=torch.float64)
        self.v, self.frame = self.k.clone(), [0] * window
        self.end = self.seen = 0

    def flush(self) -> None:
        for values in (self.k, self.v):
            values[1:3] = values[-2:].clone()
        self.end = 3

    def attend(self, q, k, v, first: int, cut: bool) -> torch.Tensor:
        c, old_end = self.chunk, self.end
        new = first + c > self.seen
        evicted = max(0, c + old_end - self.window) if new else 0
        moved = old_end - evicted - self.sink
        if evicted and moved > 0:
            low = self.sink
            for values in (self.k, self.v):
                values[low : low + moved] = values[low + evicted : low + evicted + moved].clone()
            self.frame[low : low + moved] = self.frame[low + evicted : low + evicted + moved]
        self.end = end = old_end + (c if new else 0) - evicted
        start = end - c
        protect = self.kind in ("ll", "lli") and not new and first > 0
        write = max(start, self.sink) if protect else start
        self.k[write:end], self.v[write:end] = k[write - start :], v[write - start :]
        self.frame[write:end] = range(first + write - start, first + c)
        self.seen = first + c
        shown = list(range(end))
        if self.kind in ("sf", "ll"):
            positions, query = self.frame[:end], list(range(first, first + c))
            if self.kind == "ll" and end < self.sink:  # the sink is attended whole, zeros included
                shown, positions = list(range(self.sink)), [*positions, *[0] * (self.sink - end)]
        else:
            positions = list(range(end))
            at = start
            if self.kind == "ir":
                at = self.window - c if evicted or first >= self.window else first
            query = list(range(at, at + c))
            if cut:
                positions[-3:] = query[-3:] = [45, 46, 47]
        key, value = roped(self.k[shown], positions).flatten(0, 1), self.v[shown].flatten(0, 1)
        score = torch.einsum("qhd,khd->hqk", roped(q, query).flatten(0, 1), key) * HEAD_DIM**-0.5
        return torch.einsum("hqk,khd->qhd", score.softmax(-1), value)


KINDS = {"sf": "fifo", "ll": "sink_window", "lli": "relative_window", "ir": "relative_window"}
SIZES = [
    ("sf", 6, 0, 3),
    ("sf", 7, 0, 3),
    ("ll", 9, 3, 3),
    ("ll", 8, 1, 2),
    ("ll", 10, 4, 3),
    ("ll", 5, 3, 3),
    ("lli", 9, 3, 3),
    ("lli", 8, 1, 3),
    ("lli", 10, 4, 3),
    ("ir", 6, 1, 3),
    ("ir", 8, 1, 3),
]


@pytest.mark.parametrize(("kind", "window", "sink", "chunk"), SIZES)
def test_window(kind, window, sink, chunk):
    torch.manual_seed(window * 10 + sink)
    memory_config = MemoryConfig(
        policy=KINDS[kind],
        sink=sink,
        slow=0,
        fast=window - sink,
        chunk_frames=chunk,
        slots_override=window,
        scenes=kind == "ir",
    )
    config = EngineConfig(
        "t",
        model=ModelConfig(dim=HEADS * HEAD_DIM, ffn_dim=4, heads=HEADS, layers=1),
        memory=memory_config,
        video=VideoConfig(COLUMNS * 16, ROWS * 16),
    )
    memory = Memory(config, select("cpu", prefer="reference"), torch.float64)
    plain = Plain(kind, window, sink, chunk)
    norms = (torch.ones(HEADS * HEAD_DIM, dtype=torch.float64),) * 2

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    for number in range(9):
        cut = False
        if kind == "ir" and number in (4, 6):
            memory.flush()
            plain.flush()
            cut = number == 6
        for _ in range(3):
            q, k, v = torch.randn(3, chunk * PAGE, HEADS * HEAD_DIM, dtype=torch.float64)
            got = memory.attend(0, q, k, v, norms, Pass(number * chunk, cut=cut))
            shape = (chunk, PAGE, HEADS, HEAD_DIM)
            expected = plain.attend(norm(q).view(shape), norm(k).view(shape), v.view(shape), number * chunk, cut)
            assert memory.slots_in_use(0) == plain.end
            # both in float64, but spatial angles pass through a float32 table
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
