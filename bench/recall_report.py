"""What trials of the memory say: recall with intervals, recall_seconds, drift and cost as records, a table, a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cfengine.bench.records import record
from cfengine.config import MemoryConfig

GOAL = 0.9  # recall that a policy must keep
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
    dtype: str = "float32"


class Done(NamedTuple):
    """What a task found; frames: video frames that were generated, seconds: all of it took."""

    task: Task
    views: list[View]
    drift: list[tuple[float, float, float]]  # time, palette distance, error of motion (NaN: nothing to measure)
    chunk_seconds: float  # of a session's chunk in the batch, the median
    frames: int
    seconds: float


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
        if part.task.script == "hold":
            costs[part.task.name].append((len(part.task.seeds), part.chunk_seconds))
    made = []
    for (name, script), seen in views.items():
        base = {"policy": name, "script": script, "weights": tasks[name].weights, "dtype": tasks[name].dtype}
        base["memory"] = shown(tasks[name].memory)
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
    for name, measured in costs.items():
        most = max(sessions for sessions, _ in measured)  # of full batches alone
        value = 1e3 * float(np.median([seconds for sessions, seconds in measured if sessions == most]))
        config = {"sessions": most, "threads": 1, "dtype": tasks[name].dtype}
        made.append(record(f"chunk_ms_{name}", value, "ms", config=config))
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
