"""Does the memory bring back what it saw? A landmark leaves the view, the camera comes back: is it still the same?

The past of every trial is rendered, so shape, colour and place of its landmarks are known
(cfengine/training/trials.py). All policies have the same cache and the same weights, unless --weights names others for
one. Each trial is one scene; a session that waits is forked at every time away, so that all times share one wait.
Recall counts where a landmark of the same shape and colour stands within NEAR pixels of its place in the last frame of
the way back; intervals are Wilson's, at 95 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from cfengine import Engine
from cfengine.bench.command import several
from cfengine.bench.recall_report import Done, Task, View, plot, records, table
from cfengine.bench.records import write
from cfengine.config import POLICIES, MemoryConfig, preset, with_policy
from cfengine.errors import CFEngineError, ConfigError
from cfengine.scheduler.rollout import Rollout
from cfengine.training import measure, trials, world
from cfengine.training.data import camera_script

MODEL = "tiny-world"
QUICK, TIMES = (3.0, 8.0, 20.0), (2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 32.0, 45.0, 60.0)
NEAR = 20.0  # pixels: half of the least distance between two landmarks
TURN_AWAY = 11.0  # seconds, about, for which a full turn shows nothing of a landmark
PLACE = 3.0  # pixels within which a landmark stands where it stood
BATCH = 25  # sessions in lock-step


def judge(trial: trials.Trial, frame: np.ndarray, nominal: float, away: float) -> View:
    """Compare what stands at the target's place in a frame with the target."""
    found = measure.landmarks_in(frame, trial.scene.look)
    seen = [mark for mark in found if abs(mark.centre - trial.centre) < NEAR and mark.whole]
    if not seen:
        return View(nominal, away, False, False, False, False)
    found = min(seen, key=lambda s: abs(s.centre - trial.centre))
    shape, colour = found.shape == trial.target.shape, found.colour == trial.target.colour
    return View(nominal, away, shape, colour, shape and colour, abs(found.centre - trial.centre) < PLACE)


def begin(engine: Engine, memory: MemoryConfig, given: Sequence[trials.Trial], seeds: Sequence[int]) -> Rollout:
    """A rollout of trials whose rendered past is in memory."""
    rollout = Rollout(engine.model, replace(engine.config, memory=memory), engine.ops, engine.encode_prompt, seeds)
    latents = torch.stack([engine.codec.encoder().encode(trial.past()) for trial in given])
    rollout.prime(latents, [world.prompt_for(trial.rate, trial.scene.look) for trial in given])
    return rollout


def prompts(given: Sequence[trials.Trial], rates: Iterable[int]) -> list[str]:
    return [world.prompt_for(int(rate), trial.scene.look) for trial, rate in zip(given, rates, strict=True)]


def last_frames(engine: Engine, rollout: Rollout, sessions: Iterable[int]) -> list[np.ndarray]:
    """Last video frames (H, W, 3) uint8 of some sessions; the small world's decoder looks back one latent frame."""
    return [engine.codec.decoder().decode(rollout.latents[i, -2:])[-1] for i in sessions]


def come_back(
    engine: Engine, rollout: Rollout, given: Sequence[trials.Trial], steps: Sequence[int], backwards: int
) -> dict[int, np.ndarray]:
    """Pan `steps` chunks each, against (`backwards` -1) or in (1) the direction of the past; the last frame of each."""
    found = {}
    for chunk in range(max(steps)):
        moving = [backwards * trial.rate * (chunk < count) for trial, count in zip(given, steps, strict=True)]
        rollout.step(prompts(given, moving))
        there = [i for i, count in enumerate(steps) if count == chunk + 1]
        found |= dict(zip(there, last_frames(engine, rollout, there), strict=True))
    return found


def recall(engine: Engine, task: Task) -> Done:
    """Run the trials of a task."""
    began, given = time.perf_counter(), [trials.draw_trial(seed) for seed in task.seeds]
    rollout, views, made, costs = begin(engine, task.memory, given, task.seeds), [], 0, []
    if task.script == "turn":
        counts = [trials.TURN_CHUNKS] * len(given)
        away = [trial.turned_away for trial in given]
        frames = come_back(engine, rollout, given, counts, 1)
        views = [judge(trial, frames[i], TURN_AWAY, away[i]) for i, trial in enumerate(given)]
        made = trials.TURN_CHUNKS
    else:
        most = round(max(task.times) / trials.SECONDS)
        places = trials.excursion(task.script, most, np.random.default_rng([task.seeds[0], 4]))
        leave = defaultdict(list)  # one way back may stand for two times that are near each other
        for seconds in task.times:
            leave[trials.leave_after(places, seconds)].append(seconds)
        for chunk in range(max(trial.out for trial in given)):
            rollout.step(prompts(given, [trial.rate * (chunk < trial.out) for trial in given]))
            made += 1
        for chunk in range(max(leave) + 1):
            if chunk in leave:
                fork, more = rollout.fork(), int(places[chunk])
                counts = [trial.out + more for trial in given]
                frames = come_back(engine, fork, given, counts, -1)
                for nominal in leave[chunk]:
                    views += [judge(t, frames[i], nominal, t.hidden(chunk + more)) for i, t in enumerate(given)]
                made += max(counts)
            if chunk < max(leave):
                move, start = int(places[chunk + 1] - places[chunk]), time.perf_counter()
                rollout.step(prompts(given, [move * trial.rate for trial in given]))
                costs.append((time.perf_counter() - start) / len(given))
                made += 1
    frames_made = made * world.CHUNK_VIDEO_FRAMES * len(given)
    return Done(task, views, [], float(np.median(costs or [np.nan])), frames_made, time.perf_counter() - began)


def drift(engine: Engine, task: Task) -> Done:
    """Random cameras for max(times) seconds: does the picture keep its colours, and its pace?"""
    began, given = time.perf_counter(), [trials.draw_trial(seed) for seed in task.seeds]
    rollout, found, costs = begin(engine, task.memory, given, task.seeds), [], []
    chunks = round(max(task.times) / trials.SECONDS)
    rates = np.stack([camera_script(chunks, np.random.default_rng([seed, 5])) for seed in task.seeds])
    before = last_frames(engine, rollout, range(len(given)))
    for chunk in range(chunks):
        start = time.perf_counter()
        rollout.step(prompts(given, rates[:, chunk]))
        costs.append((time.perf_counter() - start) / len(given))
        now = last_frames(engine, rollout, range(len(given)))
        for trial, rate, old, new in zip(given, rates[:, chunk], before, now, strict=True):
            error = abs(measure.image_shift(old, new) - rate) / world.CHUNK_VIDEO_FRAMES
            found.append(((chunk + 1) * trials.SECONDS, measure.palette_distance(new, trial.scene.look), error))
        before = now
    frames = chunks * world.CHUNK_VIDEO_FRAMES * len(given)
    return Done(task, [], found, float(np.median(costs)), frames, time.perf_counter() - began)


_ENGINES: dict[tuple[str, str], Engine] = {}  # of this process, by weights and dtype


def work(task: Task) -> Done:
    """One task in a process of one thread, which keeps its engine for the next."""
    key = task.weights, task.dtype
    if key not in _ENGINES:
        _ENGINES[key] = Engine.from_pretrained(task.weights, threads=1, dtype=task.dtype)
    with torch.inference_mode():
        return (drift if task.script == "drift" else recall)(_ENGINES[key], task)


def tasks(options: argparse.Namespace) -> list[Task]:
    """What the command line asks for, in batches."""
    base, weights = preset(MODEL).memory, {}
    for pair in options.weights:
        name, found, folder = pair.partition("=")
        if not found:
            raise ConfigError(f"--weights {pair!r} names no policy; give POLICY=FOLDER")
        weights[several(name, POLICIES, "policy")[0]] = folder
    rules = [(name, with_policy(base, name), weights.get(name, MODEL)) for name in options.policies]
    rules += [variant(text, base, weights) for text in options.variant]
    batches = [tuple(range(i, min(i + BATCH, options.scenes))) for i in range(0, options.scenes, BATCH)]
    drifting = tuple(range(options.drift_scenes))
    made = []
    for rule in rules:
        made += [
            Task(*rule, script, part, options.times, options.dtype) for script in options.scripts for part in batches
        ]
        if options.drift:
            made.append(Task(*rule, "drift", drifting, (options.drift,), options.dtype))
    return made


def variant(text: str, base: MemoryConfig, weights: dict[str, str]) -> tuple[str, MemoryConfig, str]:
    """Name, rule and weights of "slow_fast_paper,threshold=0.99,slow=6" or "slow_fast_paper,weights=FOLDER".

    weights: of policies that have their own      ConfigError for what a rule does not have
    """
    policy, *changes = text.split(",")
    memory = with_policy(base, several(policy, POLICIES, "policy")[0])
    folder = weights.get(memory.policy, MODEL)
    kinds = {"threshold": float, "slow": int, "fast": int, "sink": int, "interval": int}
    for change in changes:
        key, _, value = change.partition("=")
        if key == "weights" and value:
            folder = value
            continue
        try:
            memory = replace(memory, **{key: kinds[key](value)})
        except (KeyError, ValueError):
            names = ", ".join(kinds)
            raise ConfigError(
                f"variant {text!r} has {change!r}; give name=number with {names}, or weights=FOLDER"
            ) from None
    return text, memory, folder


def run(asked: list[Task], processes: int, say) -> list[Done]:
    """All tasks in processes of one thread each."""
    done, began = [], time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, task) for task in asked]):
            done.append(future.result())
            task, frames = done[-1].task, sum(part.frames for part in done)
            rate = frames / (time.perf_counter() - began)
            what = f"{task.name}, {task.script}, seeds {task.seeds[0]} to {task.seeds[-1]}"
            say(f"{len(done):3d} of {len(asked)}  {what}; {rate:.0f} frames/s")
    return done


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m cfengine.bench.recall", description=__doc__)
    made.add_argument("--policies", default="slow_fast,slow_fast_paper,fifo", help="default: %(default)s")
    made.add_argument("--scripts", default="hold", help="cameras while away: hold, wander, turn; default: %(default)s")
    made.add_argument("--times", default=",".join(f"{t:g}" for t in QUICK), help="seconds away; default: %(default)s")
    made.add_argument("--scenes", type=int, default=100)
    made.add_argument("--weights", action="append", default=[], metavar="POLICY=FOLDER", help="distilled for a policy")
    made.add_argument("--variant", action="append", default=[], metavar="POLICY,NAME=VALUE", help="an ablation")
    made.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="bfloat16 halves the time on a CPU that multiplies it, and finds the same; default: %(default)s",
    )
    made.add_argument("--drift", type=float, default=0.0, metavar="SECONDS", help="also measure drift for so long")
    made.add_argument("--drift-scenes", type=int, default=16)
    made.add_argument("--full", action="store_true", help="every policy, camera and time, and two minutes of drift")
    made.add_argument("--processes", type=int, default=2, help="of one thread each")
    made.add_argument("--json", type=Path)
    made.add_argument("--plot", type=Path)
    return made


def settle(options: argparse.Namespace) -> None:
    """Lists from texts; ConfigError for what is not there."""
    if options.full:
        options.policies, options.scripts = ",".join(POLICIES), ",".join(trials.SCRIPTS)
        options.times, options.drift = ",".join(f"{t:g}" for t in TIMES), options.drift or 120.0
    options.policies = several(options.policies, POLICIES, "policy")
    options.scripts = several(options.scripts, trials.SCRIPTS, "script")
    if options.plot and options.scripts == ["turn"]:
        raise ConfigError("a full turn takes one time, which makes no curve; add hold or wander, or leave --plot out")
    try:
        options.times = tuple(sorted(float(t) for t in options.times.split(",")))
    except ValueError:
        raise ConfigError(f"times {options.times!r} are not numbers of seconds, as in 3,8,20") from None
    if min(options.times) < 2 or options.scenes < 1:
        raise ConfigError(f"times {options.times} and {options.scenes} scenes; give at least 2 s and 1 scene")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write records and a plot."""
    options = parser().parse_args(arguments)
    try:
        settle(options)
        if options.json:
            write(options.json, [])
        found = run(tasks(options), options.processes, say)
        entries = records(found)
        sys.stdout.write(table(entries) + "\n")
        for entry in entries:
            if not entry["name"].startswith(("recall_same", "recall_shape", "recall_colour", "recall_place")):
                bound = (entry["config"] or {}).get("bound", "")
                sys.stdout.write(f"{entry['name']:40s} {bound:8s} {entry['value']:8.3f} {entry['unit']}\n")
        if options.json:
            write(options.json, entries)
        if options.plot:
            plot(options.plot, entries)
    except CFEngineError as error:
        say(f"error: {error}")
        return 1
    return 0


def say(text: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
