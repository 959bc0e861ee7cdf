"""What a training says while it runs: a bar or lines, every value as JSON lines, and their curves as a picture."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from cfengine.cli_display import LiveDisplay, PlainDisplay

COUNTS = ("seconds", "stage", "step", "of")  # entries of a line that are no curve


def can_draw() -> bool:
    """Whether matplotlib is there, which is an extra."""
    return importlib.util.find_spec("matplotlib") is not None


class Log:
    """Reports of stages: shown on standard error, and a line of JSON each in a file.

    `with log:` closes the bar. A log goes to other processes as its path alone.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.begun = path, time.monotonic()
        self._show: PlainDisplay | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "begun": self.begun, "_show": None}

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *problem) -> None:
        if self._show is not None:
            self._show.close()
            self._show = None

    def __call__(self, stage: str, values: dict) -> None:
        """values: name -> number; "step" and "of" move the bar"""
        if self._show is None:
            self._show = LiveDisplay() if sys.stderr.isatty() else PlainDisplay()
            if isinstance(self._show, LiveDisplay):
                self._show.loading(stage)  # the bar appears
        words = " ".join(f"{name} {value:.4f}" for name, value in values.items() if name not in COUNTS)
        self._show.preparing(f"{stage}  {words}", values.get("step", 0), values.get("of", 0))
        line = {"seconds": round(time.monotonic() - self.begun, 1), "stage": stage, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def curves(self) -> dict[tuple[str, str], list[tuple[int, float]]]:
        """(stage, name) -> (step, value) of every report, by step; a step that was made twice counts as it was last."""
        found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            line = json.loads(text)
            for name in set(line) - set(COUNTS):
                found[line["stage"], name][line["step"]] = line[name]
        return {key: sorted(points.items()) for key, points in sorted(found.items())}

    def draw(self) -> None:
        """Write the curves as curves.png beside the log, where matplotlib is installed."""
        curves = self.curves()
        if not curves or not can_draw():
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        columns = min(3, len(curves))
        rows = -(-len(curves) // columns)
        figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
        FigureCanvasAgg(figure)  # draws to a file, without a screen
        for place, ((stage, name), points) in enumerate(curves.items()):
            axes = figure.add_subplot(rows, columns, place + 1)
            axes.plot(*zip(*points, strict=True), linewidth=1)
            axes.set(title=f"{stage}: {name}", xlabel="step")
        figure.savefig(self.path.with_name("curves.png"), dpi=110)
