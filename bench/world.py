"""Does the small world keep its promises? Generated video measured with the renderer's own geometry.

Each seed draws a look and a camera script, streams it through `Engine` with the prompt changing at chunk edges, and is
measured at the last frame of every chunk. A second session per seed continues true rendered latents, whose landmarks
must stay what and where they are.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cfengine import Engine
from cfengine.bench.records import record, write
from cfengine.errors import CFEngineError
from cfengine.training import measure, world
from cfengine.training.data import camera_script, ratchet

CHUNK_SECONDS = world.CHUNK_VIDEO_FRAMES / world.FPS
GOALS = {  # name: (unit, goal, True where less is better)
    "pan_chunks_within_25_percent": ("share", 0.95, False),
    "hold_shift_worst": ("pixel/frame", 0.5, True),
    "landmark_views_right": ("share", 0.8, False),
    "primed_landmark_views_right": ("share", 0.8, False),
    "palette_views_right": ("share", 1.0, False),
    "palette_error_last_tenth": ("levels of 255", 12.0, True),
    "sharpness": ("share of codec", 0.7, False),
    "sharpness_last_tenth": ("share of codec", 0.7, False),
}
OTHERS = {
    "chunks_with_measurable_motion": "share",
    "hold_shift_p99": "pixel/frame",
    "landmarks_a_view": "landmarks",
    "shapes_effective": "of 4 shapes",
    "colours_effective": "of 5 colours",
    "neighbours_alike": "share",  # of scenes one in 20
}
PALETTE_LIMIT = 12.0  # mean levels that sky or ground may be off; neighbouring looks differ by 40 and more
CAMERAS = {"script": camera_script, "ratchet": ratchet}
PRIMED_CHUNKS, PRIMED_MORE = 4, 8


def stretches(rates: np.ndarray) -> list[tuple[int, int]]:
    """(first chunk, rate) of every stretch of equal rates."""
    begins = [0, *(np.flatnonzero(np.diff(rates)) + 1)]
    return [(int(b), int(rates[b])) for b in begins]


def stream(session, rates: np.ndarray, look: world.Look) -> np.ndarray:
    """Frames of a session whose prompt follows the script: (9 + 12 (chunks - 1), H, W, 3)."""
    turns = dict(stretches(rates))
    frames = []
    for chunk in range(len(rates)):
        if chunk in turns:
            session.set_prompt(world.prompt_for(turns[chunk], look))
        frames += [frame.pixels for frame in session.next_chunk()]
    return np.stack(frames)


def follow(seen: list[measure.Seen], after: list[measure.Seen], shift: float) -> tuple[int, int]:
    """(right, views): landmarks of one frame that must be whole in the next, and are there with shape and colour."""
    right = views = 0
    for landmark in seen:
        expected = landmark.centre - shift
        if not 18 <= expected <= world.WIDTH - 18:
            continue
        views += 1
        right += any(
            abs(other.centre - expected) < 3
            and (other.shape, other.colour) == (landmark.shape, landmark.colour)
            and other.whole
            for other in after
        )
    return right, views


def alike(views: list[list[measure.Seen]], yaws: np.ndarray) -> tuple[int, int]:
    """(alike, pairs): pairs of next landmarks that were whole in one view, and those of one shape and colour.

    Each place of two latent columns counts once, and after a full turn as another. yaws: of the views, in pixels
    """
    places = {}
    for view, yaw in zip(views, yaws, strict=True):
        marks = sorted(mark for mark in view if mark.whole)
        for a, b in zip(marks, marks[1:], strict=False):
            places[round((yaw + a.centre) / (2 * world.COLUMN))] = (a.shape, a.colour) == (b.shape, b.colour)
    return sum(places.values()), len(places)


class How(NamedTuple):
    """How sessions are streamed: with which `Session.effort`, and how the camera of those from a prompt alone moves."""

    effort: int = 0
    camera: str = "script"


USUAL = How()


def measure_free(engine: Engine, seed: int, chunks: int, totals: dict[str, list], how: How) -> None:
    """Stream from the prompt alone and collect what every chunk shows."""
    draw = np.random.default_rng([seed, 1])
    look, rates = world.random_look(draw), CAMERAS[how.camera](chunks, draw)
    with engine.session(world.prompt_for(int(rates[0]), look), seed=seed) as session:
        session.effort = how.effort
        video = stream(session, rates, look)
    ends = world.FIRST_CHUNK_VIDEO_FRAMES - 1 + world.CHUNK_VIDEO_FRAMES * np.arange(chunks)
    views = [measure.landmarks_in(video[end], look) for end in ends]
    for c in range(1, chunks):
        totals["landmarks"].append(follow(views[c - 1], views[c], int(rates[c])))
        rate, moved = int(rates[c]), measure.image_shift(video[ends[c - 1]], video[ends[c]])
        totals["measured"].append(not np.isnan(moved))
        if np.isnan(moved):
            continue
        if rate:
            totals["pan"].append(abs(moved - rate) <= 0.25 * abs(rate))
        else:
            totals["hold"].append(abs(moved) / world.CHUNK_VIDEO_FRAMES)
    errors = [measure.palette_error(video[end], look) for end in ends]
    totals["palette"] += [error <= PALETTE_LIMIT for error in errors]
    totals["palette_late"] += errors[-max(1, chunks // 10) :]
    totals["seen"] += [len(view) for view in views]
    totals["shapes"] += [mark.shape for view in views for mark in view]
    totals["colours"] += [mark.colour for view in views for mark in view]
    totals["neighbours"].append(alike(views, world.camera_yaws(rates)[ends]))
    codec = engine.codec
    truth = world.render(world.random_scene(draw, look), world.camera_yaws(rates, world.random_yaw(draw)))
    again = codec.decoder().decode(codec.encoder().encode(truth))
    late = slice(-max(12, len(video) // 10), None)
    totals["sharp"].append((measure.gradient_energy(video), measure.gradient_energy(again)))
    totals["sharp_late"].append((measure.gradient_energy(video[late]), measure.gradient_energy(again[late])))


def measure_primed(engine: Engine, seed: int, totals: dict[str, list], how: How) -> None:
    """Continue a true video and look for the landmarks that were whole at its end and must still be in view."""
    draw = np.random.default_rng([seed, 2])
    scene = world.random_scene(draw)
    before, after = (int(draw.choice(list(world.RATES.values()))) for _ in range(2))
    rates = np.asarray([before] * PRIMED_CHUNKS + [after] * PRIMED_MORE)
    yaws = world.camera_yaws(rates, world.random_yaw(draw))
    primed = world.FIRST_CHUNK_VIDEO_FRAMES + world.CHUNK_VIDEO_FRAMES * (PRIMED_CHUNKS - 1)
    latents = engine.codec.encoder().encode(world.render(scene, yaws[:primed]))
    with engine.session(world.prompt_for(before, scene.look), seed=seed, latents=latents) as session:
        session.effort = how.effort
        video = stream(session, rates[PRIMED_CHUNKS:], scene.look)
    known = [
        measure.Seen(centre, mark.shape, mark.colour, 1.0)
        for mark in scene.landmarks
        if 14 < (centre := (mark.bearing / world.DEGREES_PER_PIXEL - yaws[primed - 1]) % world.TURN) < world.WIDTH - 14
    ]
    for c in range(PRIMED_MORE):
        shift = yaws[primed + 12 * c + 11] - yaws[primed - 1]
        found = measure.landmarks_in(video[12 * c + 11], scene.look)
        totals["primed"].append(follow(known, found, shift))


def share(pairs: list[tuple[float, float]]) -> float:
    """Sum of the first over sum of the second."""
    return float(sum(a for a, _ in pairs) / max(1e-9, sum(b for _, b in pairs)))


def effective(kinds: list[str]) -> float:
    """How many kinds there are, each counted by its share: exp(entropy), 1 where all are one kind, 0 for none."""
    if not kinds:
        return 0.0
    shares = np.unique(kinds, return_counts=True)[1] / len(kinds)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def collect(
    engine: Engine, seeds: Iterable[int], seconds: float, say=lambda text: None, how: How = USUAL
) -> dict[str, list]:
    """Everything that is counted over `seeds`: name -> one entry a view, chunk or session."""
    totals: dict[str, list] = defaultdict(list)
    chunks = max(3, round(seconds / CHUNK_SECONDS))
    with torch.inference_mode():
        for seed in seeds:
            measure_free(engine, seed, chunks, totals, how)
            measure_primed(engine, seed, totals, how)
            shares = {name: share(totals[name]) for name in ("landmarks", "primed", "sharp")}
            words = ", ".join(f"{name} {value:.3f}" for name, value in shares.items())
            say(f"seed {seed}: so far pans {np.mean(totals['pan'] or [1]):.3f}, {words}")
    return dict(totals)


def collect_alone(seeds: list[int], seconds: float, model: str, how: How) -> dict[str, list]:
    """`collect` in a process of one thread with its own engine."""
    with Engine.from_pretrained(model, threads=1) as engine:
        return collect(engine, seeds, seconds, say, how)


def say(text: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(text + "\n")


def summary(totals: dict[str, list]) -> dict[str, float]:
    """Counts to name -> value: the names of GOALS and of OTHERS."""
    return {
        "pan_chunks_within_25_percent": float(np.mean(totals.get("pan", [0]))),  # nothing measured is no success
        "hold_shift_worst": float(max(totals.get("hold", [np.inf]))),
        "landmark_views_right": share(totals["landmarks"]),
        "primed_landmark_views_right": share(totals["primed"]),
        "palette_views_right": float(np.mean(totals["palette"])),
        "palette_error_last_tenth": float(np.mean(totals["palette_late"])),
        "sharpness": share(totals["sharp"]),
        "sharpness_last_tenth": share(totals["sharp_late"]),
        "chunks_with_measurable_motion": float(np.mean(totals["measured"])),
        "hold_shift_p99": float(np.percentile(totals.get("hold", [np.inf]), 99)),
        "landmarks_a_view": float(np.mean(totals["seen"])),
        "shapes_effective": effective(totals.get("shapes", [])),
        "colours_effective": effective(totals.get("colours", [])),
        "neighbours_alike": share(totals.get("neighbours", [])),
    }


def evaluate(engine: Engine, seeds: Iterable[int], seconds: float) -> dict[str, float]:
    """Measure every promise over `seeds`, here and now."""
    return summary(collect(engine, seeds, seconds))


def records(values: dict[str, float], config: dict) -> list[dict]:
    """One record a value; `baseline` is the goal and `ratio` value / goal, where there is a goal."""
    made = []
    for name, value in values.items():
        unit, goal, _ = GOALS.get(name, (OTHERS.get(name, ""), None, False))
        made.append(record(name, value, unit, goal, None if goal is None else value / goal, config))
    return made


def missed(values: dict[str, float]) -> list[str]:
    """Sentences for the goals that were not reached."""
    return [
        f"{name} is {values[name]:.3f} {unit}, goal {'at most' if less else 'at least'} {goal}"
        for name, (unit, goal, less) in GOALS.items()
        if (values[name] > goal if less else values[name] < goal)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write records, and exit with 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.bench.world", description=__doc__)
    parser.add_argument("--model", default="tiny-world", help="preset or folder; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--effort", type=int, default=0, help="level of effort of every chunk; default: 0, full")
    parser.add_argument(
        "--camera",
        choices=list(CAMERAS),
        default="script",
        help="of sessions from a prompt alone: a random script, or on and back and on again; default: %(default)s",
    )
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    how = How(options.effort, options.camera)
    try:
        with Engine.from_pretrained(options.model, threads=1) as engine, engine.session("hold") as session:
            session.effort = options.effort  # a name or a level that is none is said here, and not by every process
    except CFEngineError as error:
        say(f"error: {error}")
        return 1
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        parts = [seeds[i :: options.processes] for i in range(options.processes)]
        alone = partial(collect_alone, seconds=options.seconds, model=options.model, how=how)
        done = list(pool.map(alone, parts))
    names = {name for part in done for name in part}
    values = summary({name: [entry for part in done for entry in part.get(name, [])] for name in names})
    for name, value in values.items():
        sys.stdout.write(f"{name:32s} {value:8.3f}\n")
    if options.json:
        config = {"model": options.model, "seeds": options.seeds, "seconds": options.seconds}
        config |= how._asdict()
        write(options.json, records(values, config))
    problems = missed(values)
    for sentence in problems:
        say(sentence)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
