"""Table, records and picture of what videos scored in their windows."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from cfengine.bench import plots
from cfengine.bench.quality_models import Prompt
from cfengine.bench.quality_windows import HALF, MEASURES, Measured, seconds
from cfengine.bench.records import record
from cfengine.errors import OutputError

Times = tuple[Fraction, ...]


class Scored(NamedTuple):
    """One video, file or stream, and what it scored; prompt: None where none was given."""

    source: str
    words: str | None
    prompt: Prompt | None
    measured: Measured

    def score(self, measure: str, t: Fraction) -> float | None:
        """100 times the mean cosine, as the paper prints it; None where there is none."""
        found = self.measured.means.get(measure, {}).get(t)
        return None if found is None else 100 * found

    def told(self, t: Fraction, measure: str) -> dict:
        """What a record says of this video."""
        told = {"source": self.source, "value": self.score(measure, t), "frames": self.measured.frames[t]}
        if measure == "clip_t":
            told |= {"prompt": self.words, "prompt_tokens": self.prompt.tokens, "tokens_read": self.prompt.read}
        return told


def scores(videos: list[Scored], measure: str, t: Fraction) -> list[float]:
    """Of the videos that have one."""
    return [value for video in videos if (value := video.score(measure, t)) is not None]


def records(videos: list[Scored], times: Times, shape: dict) -> list[dict]:
    """`quality_<measure>_<t>s`: the mean over the videos that reach the window, each with its own value in `config`."""
    made = []
    for measure, formula in MEASURES.items():
        for t in times:
            reached = [video for video in videos if video.score(measure, t) is not None]
            if not reached:
                continue
            told = [video.told(t, measure) for video in reached]
            config = shape | {
                "mean_of": formula,
                "window_seconds": [float(t - HALF), float(t + HALF)],
                "videos": told,
            }
            value = fmean(one["value"] for one in told)
            made.append(record(f"quality_{measure}_{seconds(t)}s", value, "cosine x 100", config=config))
    return made


def header(times: Times) -> str:
    """First line of the table."""
    return f"{'':<32}{'cosine x 100':<14}" + "".join(f"{seconds(t) + ' s':>9}" for t in times)


def rows(videos: list[Scored], times: Times) -> str:
    """A line a measure: the scores of one video, or the means of several."""
    name = Path(videos[0].source).name if len(videos) == 1 else f"mean of {len(videos)} videos"
    lines = []
    for measure in MEASURES:
        found = [scores(videos, measure, t) for t in times]
        if any(found):
            cells = "".join(f"{fmean(cell):>9.2f}" if cell else f"{'-':>9}" for cell in found)
            lines.append(f"{name if not lines else '':<32}{measure:<14}{cells}")
    return "\n".join(lines)


def remarks(video: Scored, times: Times) -> list[str]:
    """Sentences on what was left out: windows beyond the end, CLIP-T without a prompt, the end of a long prompt."""
    said = []
    absent = [t for t in times if t not in video.measured.frames]
    if absent:
        shown = ", ".join(map(seconds, absent))
        said.append(
            f"{video.source} has its last frame at {float(video.measured.end):.2f} s: "
            f"no frame within {seconds(HALF)} s of {shown} s, left out"
        )
    if video.prompt is None:
        said.append(f"CLIP-T of {video.source} is left out: it has no --prompt")
    elif video.prompt.read < video.prompt.tokens:
        said.append(
            f"CLIP reads {video.prompt.read} tokens and the prompt of {video.source} has {video.prompt.tokens}: "
            "CLIP-T compares with its beginning"
        )
    return said


def uneven(videos: list[Scored], times: Times) -> str:
    """A sentence on means that not all videos are in; "" where there is none."""
    reach = {t: sum(t in video.measured.frames for video in videos) for t in times}
    fewer = [f"{seconds(t)} s of {count}" for t, count in reach.items() if 0 < count < len(videos)]
    return f"of {len(videos)} videos not all are in every mean: {', '.join(fewer)}" if fewer else ""


def picture(path: str | Path, videos: list[Scored], times: Times) -> None:
    """A panel a measure: a thin line a video, a thick one for their mean, as far as all of them reach.

    ConfigError: matplotlib is missing.  OutputError: the file cannot be written.
    """
    figure, panels = plots.panels(len(MEASURES), 3.7, 3.6)
    for panel, measure in zip(panels, MEASURES, strict=True):
        for several in [[video] for video in videos] + [videos] * (len(videos) > 1):
            found = {float(t): scores(several, measure, t) for t in times}
            points = [(t, fmean(cell)) for t, cell in found.items() if cell and len(cell) == len(several)]
            mean = several is videos or len(videos) == 1
            shape = {"marker": "o", "linewidth": 2.0} if mean else {"linewidth": 0.7, "alpha": 0.5}
            panel.plot(*zip(*points, strict=True) if points else ([], []), color="C0", **shape)
        panel.set_title(f"{measure}, {len(videos)} video(s)", fontsize=10)
        panel.set_xlabel("s")
    panels[0].set_ylabel("cosine x 100")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise OutputError(f"cannot write {path} ({error}); give a .png in a folder that is there") from None
