"""The bench of recall: what counts as found again, intervals, rollouts that are the engine's own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cfengine import Engine
from cfengine.bench import recall, recall_report
from cfengine.config import preset, with_policy
from cfengine.training import trials, world

pytestmark = pytest.mark.cpu
MEMORY = preset("tiny-world").memory


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny-world", threads=1) as made:
        yield made


def there(trial: trials.Trial, target: world.Landmark | None) -> np.ndarray:
    """The last frame of the past with `target` in place of the trial's own."""
    marks = tuple(m for m in trial.scene.landmarks if m != trial.target) + ((target,) if target else ())
    return replace_marks(trial, marks).past()[-1]


def replace_marks(trial: trials.Trial, marks: tuple[world.Landmark, ...]) -> trials.Trial:
    return trial._replace(scene=replace(trial.scene, landmarks=marks))


@pytest.mark.parametrize("seed", range(5))
def test_judges_shape_colour_and_place_apart(seed: int) -> None:
    trial = trials.draw_trial(seed)
    shape = next(s for s in world.SHAPES if s != trial.target.shape)
    colour = next(c for c in world.COLOURS if c != trial.target.colour)

    def judged(**changes) -> tuple[bool, ...]:
        return recall.judge(trial, there(trial, replace(trial.target, **changes)), 3.0, 2.9)[2:]

    assert judged() == (True, True, True, True)
    assert judged(shape=shape) == (False, True, False, True)
    assert judged(colour=colour) == (True, False, False, True)
    moved = trial.target.bearing + 6 * world.DEGREES_PER_PIXEL
    assert judged(bearing=moved) == (True, True, True, False)
    assert recall.judge(trial, there(trial, None), 3.0, 2.9)[2:] == (False, False, False, False)


def test_wilson_interval() -> None:
    """Against values that R's prop.test(90, 100, correct = FALSE) and the formula at 0 of 10 give."""
    assert recall_report.wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert recall_report.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(2, 1.0), (4, 0.95), (8, 0.85)], (6.0, "between")),
        ([(2, 0.5), (4, 0.95)], (2.0, "under")),
        ([(2, 1.0), (60, 0.9)], (60.0, "at least")),
        ([(2, 0.9), (4, 0.0), (8, 1.0)], (2.0, "between")),  # the first time that it falls counts
    ],
)
def test_seconds_kept(curve, expected) -> None:
    seconds, kind = recall_report.seconds_kept(curve)
    assert (pytest.approx(seconds), kind) == expected


def primed(trial: trials.Trial, engine: Engine) -> torch.Tensor:
    return engine.codec.encoder().encode(trial.past())


def test_a_rollout_is_what_a_session_streams(engine) -> None:
    """Bit for bit, pixels too: the decoder looks back one latent frame, so the last one needs no earlier state."""
    trial = trials.draw_trial(1)
    prompt, latents = world.prompt_for(trial.rate, trial.scene.look), primed(trial, engine)
    with torch.inference_mode(), engine.session(prompt, seed=1, latents=latents) as session:
        rollout = recall.begin(engine, engine.config.memory, [trial], [1])
        for _ in range(2):
            frames = session.next_chunk()
            rollout.step([prompt])
            assert torch.equal(rollout.latents[0], session.latents)
            assert np.array_equal(recall.last_frames(engine, rollout, [0])[0], frames[-1].pixels)


@pytest.mark.parametrize("policy", ["slow_fast_paper", "slow_fast", "fifo"])
def test_a_fork_leaves_the_present_alone(engine, policy: str) -> None:
    given = [trials.draw_trial(seed) for seed in (1, 2)]
    prompts = recall.prompts(given, [trial.rate for trial in given])
    with torch.inference_mode():
        one, other = (recall.begin(engine, with_policy(MEMORY, policy), given, [1, 2]) for _ in range(2))
        for rollout in (one, other):
            rollout.step(prompts)
        fork = one.fork()
        assert fork.memories[0].pool.k.data_ptr() != one.memories[0].pool.k.data_ptr()
        fork.step(recall.prompts(given, [0, 0]))
        for rollout in (one, other):
            rollout.step(prompts)
        again = other.fork()
    assert torch.equal(one.latents, other.latents) and not torch.equal(fork.latents, one.latents)
    for memory, same in zip(other.memories, again.memories, strict=True):
        tables = ([*each.tables.tensors().values()][:10] for each in (memory, same))
        assert all(map(torch.equal, *tables))
        assert torch.equal(memory.pool.v, same.pool.v)


def test_the_command_counts_every_trial(engine, tmp_path, capsys) -> None:
    arguments = ["--policies", "fifo", "--times", "2", "--scenes", "3", "--processes", "1", "--scripts", "hold"]
    assert recall.main([*arguments, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]) == 0
    out = capsys.readouterr().out
    assert "recall_seconds_fifo" in out and "chunk_ms_fifo" in out
    assert (tmp_path / "r.png").stat().st_size > 5000
    entries = {entry["name"]: entry for entry in json.loads((tmp_path / "r.json").read_text())}
    assert entries["recall_same_hold_2s_fifo"]["config"]["trials"] == 3


def test_every_camera_and_drift_leave_their_records(engine, tmp_path) -> None:
    """2.0 and 2.1 s begin the way back at the same chunk: both keep all their trials."""
    arguments = ["--policies", "slow_fast_paper", "--times", "2,2.1", "--scenes", "2", "--processes", "1"]
    more = ["--scripts", "wander,turn", "--drift", "1.5", "--drift-scenes", "2", "--json", str(tmp_path / "r.json")]
    assert recall.main([*arguments, *more]) == 0
    entries = {entry["name"]: entry for entry in json.loads((tmp_path / "r.json").read_text())}
    for name in ("wander_2s", "wander_2.1s", "turn_11s"):
        assert entries[f"recall_same_{name}_slow_fast_paper"]["config"]["trials"] == 2
    for name in ("palette_first", "palette_last", "motion_first", "motion_last"):
        assert np.isfinite(entries[f"drift_{name}_slow_fast_paper"]["value"])


def test_a_variant_changes_rule_and_weights() -> None:
    name, memory, folder = recall.variant("slow_fast_paper,threshold=0.9,slow=6,weights=a/b", MEMORY, {})
    assert (memory.threshold, memory.slow, folder) == (0.9, 6, "a/b") and name.startswith("slow_fast_paper,threshold")
    assert recall.variant("fifo", MEMORY, {"fifo": "own"}) == ("fifo", with_policy(MEMORY, "fifo"), "own")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policies", "lru"], "unknown policy 'lru'"),
        (["--times", "soon"], "not numbers"),
        (["--times", "1"], "at least 2 s"),
        (["--variant", "fifo,tau=3"], "threshold, slow"),
        (["--weights", "lru=x"], "unknown policy"),
        (["--scripts", "turn", "--plot", "x.png"], "makes no curve"),
        (["--weights", "x"], "POLICY=FOLDER"),
    ],
)
def test_bad_requests_are_sentences(arguments, words, capsys) -> None:
    assert recall.main(arguments) == 1
    assert words in capsys.readouterr().err
