"""An hour of a live stream with random events: no frame lost or out of order, no event lost, no memory gained."""

from __future__ import annotations

import dataclasses
import gc
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from cfengine import Prompt, Reset
from cfengine.config import MemoryConfig

pytestmark = pytest.mark.cpu

HOUR = 57_600  # video frames at 16 a second
PASSES = (4, 3, 2, 2)  # at each level of effort; the last reads less of the memory besides
PROMPTS = [f"scene {i}" for i in range(40)]
# Threads, caches of prompts and the allocator settle in the first tenth; later the same work is done again and again.
# One leaked chunk of latents in a hundred would be 2 MB in the rest, one leaked frame a chunk 100 MB.
GROWTH = 24 * 2**20


def resident() -> int:
    """Bytes of memory that the process holds now."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Watch:
    """What a consumer counts."""

    def __init__(self, session) -> None:
        self.session, self.index, self.chunk, self.frames = session, 0, 0, 0
        self.asked: set[int] = set()  # events that were pushed and not shown yet
        self.shown = 0
        self.anew = False  # the next frame follows nothing
        self.efforts: set[int] = set()
        self.kept: list[tuple] = []

    def look(self) -> None:
        """Take a chunk and hold it against the one before."""
        effort, session = self.session.effort, self.session
        frames = session.next_chunk()
        fps = session.config.video.fps
        assert len(frames) == (9 if self.anew or not self.index else 12)
        passes, near = PASSES[effort], effort == 3
        assert (frames[0].timings.effort, frames[0].timings.passes, frames[0].timings.near) == (effort, passes, near)
        assert [frame.cut for frame in frames] == [self.anew] + [False] * (len(frames) - 1)
        self.anew = False
        self.efforts.add(effort)
        for frame in frames:
            assert frame.index == self.index and frame.time == frame.index / fps and frame.timings.chunk == self.chunk
            self.index += 1
        assert torch.isfinite(session.latents).all()
        for receipt in frames[0].timings.events:
            assert receipt.event_id in self.asked and receipt.pushed <= receipt.applied <= receipt.shown
            self.asked.remove(receipt.event_id)
            self.shown += 1
        self.chunk, self.frames = self.chunk + 1, self.frames + len(frames)

    def keep(self) -> None:
        self.kept = [*self.kept[-2:], (self.session.snapshot(), self.index, self.chunk)]

    def go_back(self, draw: np.random.Generator) -> None:
        snapshot, self.index, self.chunk = self.kept[draw.integers(len(self.kept))]
        self.session.rewind(snapshot)
        self.asked.clear()  # none waits in a snapshot here: every push has waited for its text, and a chunk follows


def do_something(watch: Watch, draw: np.random.Generator, switches: list[str]) -> None:
    """One random event before a chunk; most chunks have none."""
    kinds = ["none", "prompt", "keep", "back", "branch", "reset", "effort"]
    kind = draw.choice(kinds, p=[0.64, 0.2, 0.04, 0.03, 0.03, 0.02, 0.04])
    if kind == "prompt":
        event = Prompt(str(draw.choice(PROMPTS)), str(draw.choice(switches)))
        watch.asked.add(watch.session.push(event, wait=True))
    elif kind == "reset":
        seed = None if draw.integers(2) else int(draw.integers(100))
        watch.asked.add(watch.session.push(Reset(seed), wait=True))
        watch.anew = True
    elif kind == "effort":
        watch.session.effort = int(draw.integers(len(watch.session.efforts)))
    elif kind == "keep":
        watch.keep()
    elif kind == "back" and watch.kept:
        watch.go_back(draw)
    elif kind == "branch":
        with watch.session.branch() as other:
            assert other.next_chunk()[0].index == watch.index


@pytest.mark.parametrize(
    ("policy", "switches", "frames"),
    [
        ("slow_fast_paper", ["cross", "blend(3)", "recache"], HOUR),
        ("relative_window", ["cross", "blend(3)", "flush"], HOUR // 12),
    ],
)
def test_an_hour_of_random_events(toy_engine, policy: str, switches: list[str], frames: int) -> None:
    engine = toy_engine(memory=dataclasses.replace(MemoryConfig(), policy=policy))
    draw = np.random.default_rng(11)
    with engine.session("the beginning", seed=1) as session:
        watch, settled = Watch(session), 0
        while watch.frames < frames:
            do_something(watch, draw, switches)
            watch.look()
            if not settled and watch.frames > frames // 10:
                gc.collect()
                settled = resident()
        assert not watch.asked and watch.shown > frames / 12 / 10 and watch.efforts == {0, 1, 2, 3}
        gc.collect()
        assert resident() - settled < GROWTH
