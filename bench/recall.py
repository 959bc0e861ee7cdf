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
from typing import NamedTuple

import numpy as np
import torch

from cfengine import Engine
from cfengine.bench.command import several
from cfengine.bench.records import record, write
from cfengine.config import POLICIES, MemoryConfig, preset, with_policy
from cfengine.errors import CFEngineError, ConfigError
from cfengine.scheduler.rollout import Rollout
from cfengine.training import measure, trials, world
from cfengine.training.data import camera_script

MODEL = "tiny-world-recall"
QUICK, TIMES = (3.0, 8.0, 20.0), (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 45.0, 60.0)
NEAR = 20.0  # pixels: half of the least distance between two landmarks
TURN_AWAY = 11.0  # seconds, about, for which a full turn shows nothing of a landmark
PLACE = 3.0  # pixels within which a landmark stands where it stood
FIT = 0.8  # as in cfengine.bench.world
GOAL = 0.9  # recall that a policy must keep
BATCH = 25  # sessions in lock-step
WINDOW = 10.0  # seconds over which drift is averaged


class View(NamedTuple):
    """What a trial found on coming back; away: seconds for which nothing of the target was in view."""

    nominal: float
    away: float
    shape: bool
    colour: bool
    same: bool  # shape and colour
    place: bool


class Task(NamedTuple):
    """Trials for one process: which rule, under which weights, which camera, which seeds."""

    name: str
    memory: MemoryConfig
    weights: str
    script: str  # of trials.SCRIPTS, or "drift"
    seeds: tuple[int, ...]
    times: tuple[float, ...]


class Done(NamedTuple):
    """What a task found; frames: video frames that were generated, seconds: all of it took."""

    task: Task
    views: list[View]
    drift: list[tuple[float, float, float]]  # time, palette distance, error of motion (NaN: nothing to measure)
    chunk_seconds: float  # of a session's chunk in the batch, the median
    frames: int
    seconds: float


def judge(trial: trials.Trial, frame: np.ndarray, nominal: float, away: float) -> View:
    """Compare what stands at the target's place in a frame with the target."""
    found = measure.landmarks_in(frame, trial.scene.look)
    seen = [mark for mark in found if abs(mark.centre - trial.centre) < NEAR and mark.fit >= FIT]
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


_ENGINES: dict[str, Engine] = {}  # of this process, by weights


def work(task: Task) -> Done:
    """One task in a process of one thread, which keeps its engine for the next."""
    if task.weights not in _ENGINES:
        _ENGINES[task.weights] = Engine.from_pretrained(task.weights, threads=1)
    with torch.inference_mode():
        return (drift if task.script == "drift" else recall)(_ENGINES[task.weights], task)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927), 95 % at z = 1.96."""
    share, room = right / count, z * z / count
    middle, half = share + room / 2, z * np.sqrt(share * (1 - share) / count + room / (4 * count))
    return float((middle - half) / (1 + room)), float((middle + half) / (1 + room))


def seconds_kept(curve: Sequence[tuple[float, float]]) -> tuple[float, str]:
    """Time away at which recall falls under GOAL, between two tested times on a straight line.

    curve: (seconds, recall), by time      -> seconds and "between", or the bound that tests give: "at least", "under"
    """
    for (early, high), (late, low) in zip([(curve[0][0], 1.0), *curve], curve, strict=False):
        if low < GOAL:
            if late == curve[0][0]:
                return late, "under"
            return early + (late - early) * (high - GOAL) / (high - low), "between"
    return curve[-1][0], "at least"


def records(done: Iterable[Done]) -> list[dict]:
    """Recall by rule, camera and time away with intervals; recall_seconds_<policy>; drift; cost of a chunk."""
    views, drifts, costs, tasks = defaultdict(list), defaultdict(list), defaultdict(list), {}
    for part in done:
        key = (part.task.name, part.task.script)
        tasks[part.task.name] = part.task
        views[key] += part.views
        drifts[part.task.name] += part.drift
        costs[part.task.name].append(part.chunk_seconds)
    made = []
    for (name, script), seen in views.items():
        base = {"policy": name, "script": script, "weights": tasks[name].weights, "memory": shown(tasks[name].memory)}
        curve = []
        for nominal in sorted({view.nominal for view in seen}):
            group = [view for view in seen if view.nominal == nominal]
            away = float(np.mean([view.away for view in group]))
            for what in ("same", "shape", "colour", "place"):
                right = sum(getattr(view, what) for view in group)
                config = {
                    **base,
                    "seconds_away": round(away, 2),
                    "trials": len(group),
                    "interval": wilson(right, len(group)),
                }
                made.append(
                    record(f"recall_{what}_{script}_{nominal:g}s_{name}", right / len(group), "share", config=config)
                )
                if what == "same":
                    curve.append((away, right / len(group)))
        if script == "hold":
            value, kind = seconds_kept(curve)
            made.append(record(f"recall_seconds_{name}", value, "s", config={**base, "bound": kind, "under": GOAL}))
    for name, points in drifts.items():
        for title, place, unit in (("palette", 1, "levels of 255"), ("motion", 2, "pixel/frame")) if points else ():
            last = max(point[0] for point in points)
            for when, chosen in (("first", lambda t: t <= WINDOW), ("last", lambda t, last=last: t > last - WINDOW)):
                value = float(np.nanmean([point[place] for point in points if chosen(point[0])]))
                made.append(record(f"drift_{title}_{when}_{name}", value, unit, config={"seconds": last}))
    for name, seconds in costs.items():
        value = 1e3 * float(np.nanmedian(seconds))
        made.append(record(f"chunk_ms_{name}", value, "ms", config={"sessions": BATCH, "threads": 1}))
    return made


def shown(memory: MemoryConfig) -> dict:
    """What of a rule a record says."""
    names = ("policy", "sink", "slow", "fast", "slots", "threshold", "interval")
    return {name: getattr(memory, name) for name in names}


def table(entries: list[dict]) -> str:
    """Recall as a table: a row a policy and camera, a column a time."""
    cells, times = {}, set()
    for entry in entries:
        config = entry["config"]
        if entry["name"].startswith("recall_same_"):
            nominal = float(entry["name"].split("_")[3][:-1])
            low, high = config["interval"]
            cells[(config["policy"], config["script"], nominal)] = f"{entry['value']:4.0%} ({low:.0%}-{high:.0%})"
            times.add(nominal)
    rows = list(dict.fromkeys(key[:2] for key in cells))
    lines = [f"{'same shape and colour, after':34s}" + "".join(f"{t:>8.3g} s       " for t in sorted(times))]
    for row in rows:
        parts = [f"{cells.get((*row, t), ''):>17s}" for t in sorted(times)]
        lines.append(f"{row[0]:24s}{row[1]:8s}" + "".join(parts))
    return "\n".join(lines)


def plot(path: Path, entries: list[dict]) -> None:
    """Recall against time away, a line a policy, a panel a camera, intervals as bands."""
    from cfengine.bench.plots import panels

    curves = defaultdict(list)
    for entry in entries:
        config = entry["config"]
        if entry["name"].startswith("recall_same_") and config["script"] != "turn":
            curves[(config["script"], config["policy"])].append(
                (config["seconds_away"], entry["value"], *config["interval"])
            )
    scripts = list(dict.fromkeys(script for script, _ in curves))
    figure, found = panels(len(scripts), 5.2, 4.0)
    for axes, script in zip(found, scripts, strict=True):
        for (of, policy), points in curves.items():
            if of == script:
                times, values, low, high = zip(*sorted(points), strict=True)
                (line,) = axes.plot(times, values, marker="o", markersize=3, label=policy)
                axes.fill_between(times, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.axhline(GOAL, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title={"hold": "the camera waits", "wander": "the camera wanders"}[script], ylim=(-0.02, 1.02))
        axes.set(xscale="log", xlabel="seconds out of view", ylabel="same shape and colour")
        axes.set_xticks([2, 4, 8, 16, 32, 60], ["2", "4", "8", "16", "32", "60"])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def tasks(options: argparse.Namespace) -> list[Task]:
    """What the command line asks for, in batches."""
    base, weights = preset(MODEL).memory, {}
    for pair in options.weights:
        name, found, folder = pair.partition("=")
        if not found:
            raise ConfigError(f"--weights {pair!r} names no policy; give POLICY=FOLDER")
        weights[several(name, POLICIES, "policy")[0]] = folder
    seeds = [tuple(range(i, min(i + BATCH, options.scenes))) for i in range(0, options.scenes, BATCH)]
    rules = {name: with_policy(base, name) for name in options.policies}
    made = []
    for name, memory in rules.items():
        of = weights.get(name, MODEL)
        made += [Task(name, memory, of, script, part, options.times) for script in options.scripts for part in seeds]
        if options.drift:
            made.append(Task(name, memory, of, "drift", tuple(range(options.drift_scenes)), (options.drift,)))
    for text in options.variant:
        name, memory = variant(text, base)
        of = weights.get(memory.policy, MODEL)
        made += [Task(name, memory, of, script, part, options.times) for script in options.scripts for part in seeds]
    return made


def variant(text: str, base: MemoryConfig) -> tuple[str, MemoryConfig]:
    """Name and rule of "slow_fast_paper,threshold=0.99,slow=6"; ConfigError for what a rule does not have."""
    policy, *changes = text.split(",")
    memory = with_policy(base, several(policy, POLICIES, "policy")[0])
    for change in changes:
        key, _, value = change.partition("=")
        kinds = {"threshold": float, "slow": int, "fast": int, "sink": int, "interval": int}
        try:
            memory = replace(memory, **{key: kinds[key](value)})
        except (KeyError, ValueError):
            raise ConfigError(f"variant {text!r} has {change!r}; give name=number with {', '.join(kinds)}") from None
    return text, memory


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
    made.add_argument("--variant", action="append", default=[], metavar="POLICY,NAME=NUMBER", help="an ablation")
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
