"""Configurations: the shipped ones, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfengine.config import preset
from cfengine.errors import ConfigError
from cfengine.training.optimiser import schedule
from cfengine.training.settings import CONFIGS, Descent, Length, Settings, built_in, read

pytestmark = pytest.mark.cpu


def test_shipped_configurations() -> None:
    assert built_in() == ["tiny-world", "wan2.1-t2v-1.3b"]
    small, wan = (read(name) for name in built_in())
    assert small.config == preset("tiny-world") and small.worded
    assert (small.codec.steps, small.teacher.steps, small.lookup.steps, small.student.steps) == (1800, 2200, 1800, 350)
    assert small.student.seeds == (41,) and small.teacher.lengths[0] == Length(1, 16, 1.0, 0.4)
    assert small.data.coupled and not wan.data.coupled
    assert wan.config.model == preset("wan2.1-t2v-1.3b").model and not wan.worded
    assert wan.teacher.steps == 8000 and wan.teacher.batch == 8 and wan.student.batch == 64
    assert round(wan.student.steps * wan.student.local) == 600 and wan.student.steps == 1100
    assert wan.student.peak * wan.student.critic_pace == pytest.approx(4e-7)
    assert [3 * chunks for chunks in (wan.student.short[1], wan.student.long[0], wan.student.long[2])] == [21, 84, 105]


def test_configurations_are_shipped() -> None:
    """The pattern of setup.py finds every file that is read here."""
    root = CONFIGS.parent.parent
    assert '"training/configs/*.toml"' in Path(root.parent / "setup.py").read_text()
    assert {path.stem for path in root.glob("training/configs/*.toml")} == set(built_in())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("preset = 'tiny-world'\nlearning = 3", "'learning'; known are preset, model, memory"),
        ("preset = 'tiny-world'\n[student]\nstep = 3", "'student.step'; known are steps, peak"),
        ("preset = 'tiny-world'\n[student]\nsteps = '3'", "student.steps is '3', and must be int"),
        ("preset = 'tiny-world'\n[student]\nsteps = true", "student.steps is True, and must be int"),
        ("preset = 'tiny-world'\n[student]\nlong = [1, 2]", r"student.long is \[1, 2\], and must be tuple"),
        ("preset = 'tiny-world'\n[teacher]\nlengths = [[2, 1]]", "missing 2 required"),
        ("preset = 'tiny-world'\n[teacher]\nlengths = []", "at least 0 chunks"),
        ("preset = 'tiny-world'\n[teacher]\noptimiser = 'sgd'", "optimiser is 'sgd'"),
        ("preset = 'tiny-world'\n[model]\ndim = 100", "dim 100 does not divide into 6 heads"),
        ("preset = 'tiny-world'\n[model]\ndims = 100", "'model.dims'; known are dim"),
        ("preset = 'tiny-world'\n[memory]\npolicy = 'slow_fast'", "policy is 'slow_fast'; training runs"),
        ("preset = 'tiny-world'\n[student.judges]\nsinks = 3", "has 'student.judges.sinks'; known are policy"),
        ("preset = 'tiny-world'\n[data]\nsource = 'clips'", "clips need a folder"),
        ("preset = 'tiny-world'\n[data]\nsource = 'clips'\nfolder = 'x'\ncoupled = true", "data.coupled is true"),
        ("preset = 'context-forcing'\n[memory]\npolicy = 'slow_fast_paper'", "set data.source to 'clips'"),
        ("preset = 'world'", "unknown preset 'world'"),
        ("[student]\nsteps = 3", "preset"),
        ("preset = ", "cannot be read"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(tmp_path, text: str, said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as problem:
        read(str(path))
    assert str(problem.value).startswith("training config") and "wrong.toml" in str(problem.value)


def test_changes_on_the_command_line() -> None:
    changed = read("tiny-world", ["student.steps=7", "student.seeds=[1, 2]", "memory.threshold=1"])
    assert changed.student.steps == 7 and changed.student.seeds == (1, 2) and changed.student.turns == 4
    assert changed.config.memory.threshold == 1.0
    with pytest.raises(ConfigError, match="'student.stops'"):
        read("tiny-world", ["student.stops=7"])
    with pytest.raises(ConfigError, match="--set 'student' is no TOML"):
        read("tiny-world", ["student"])
    with pytest.raises(ConfigError, match="one of tiny-world, wan2.1-t2v-1.3b"):
        read("huge-world")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("passes", "[1000, 500, 500]"),
        ("passes", "[1200, 500]"),
        ("passes", "[500, 0]"),
        ("first", "0.95"),
        ("far", "-0.1"),
        ("blend", "0.0"),
        ("shares", "[0.5, 0.5, 0.5, 0.5]"),
        ("shares", "[0.3, 0.3, 0.4]"),
        ("held", "4"),
    ],
)
def test_a_polish_that_is_none(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"polish\..*{key}"):
        read("tiny-world", [f"polish.{key}={value}"])


def test_scaled_steps() -> None:
    small = Settings("tiny-world").scaled(0.001)
    assert (small.codec.steps, small.codec.decoder_steps, small.teacher.steps, small.lookup.steps) == (2, 1, 3, 2)
    assert read("tiny-world").scaled(0.1).polish.steps == read("tiny-world").polish.steps / 10
    assert read("wan2.1-t2v-1.3b").scaled(0.5).lookup.steps == 0


def test_batches_that_processes_do_not_make() -> None:
    Descent(1, 1.0, 1, batch=8).check_batch("teacher", 2, 4)
    Descent(1, 1.0, 1).check_batch("teacher", 2, 3)
    with pytest.raises(ConfigError, match="student.batch is 8 .* 3 processes of 2 make 6; start 4 processes"):
        Descent(1, 1.0, 1, batch=8).check_batch("student", 2, 3)


def test_learning_rates() -> None:
    falling, constant = Descent(100, 2.0, 10), Descent(100, 2.0, 10, constant=True)
    assert schedule(0, constant) == pytest.approx(0.2) and schedule(9, constant) == schedule(99, constant) == 2.0
    assert schedule(50, falling) == pytest.approx(2.0 * 0.51) and schedule(100, falling) == pytest.approx(0.04)
