"""Pictures of records; matplotlib is an extra and is imported where a picture is made."""

from __future__ import annotations

from pathlib import Path

from cfengine.errors import ConfigError


def panels(count: int, width: float, height: float):
    """(figure, list of axes) of a picture of `count` panels side by side; ConfigError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"a plot needs matplotlib ({error}); pip install matplotlib, or leave --plot out") from None
    figure = Figure(figsize=(count * width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws to a file, without a screen
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def axes(width: float, height: float):
    """(figure, axes) of a new picture; see `panels`."""
    figure, (plot,) = panels(1, width, height)
    return figure, plot


def stacked(path: str | Path, columns: dict[str, dict[str, float]], title: str) -> None:
    """A bar a column, its terms (milliseconds) one on the other, each written beside its part."""
    figure, plot = axes(2.2 + 1.8 * len(columns), 5.5)
    terms = list(dict.fromkeys(term for parts in columns.values() for term in parts))
    bottoms = dict.fromkeys(columns, 0.0)
    for term in terms:
        heights = [max(0.0, parts.get(term, 0.0)) for parts in columns.values()]
        plot.bar(list(columns), heights, bottom=list(bottoms.values()), label=term, width=0.6)
        for place, (column, height) in enumerate(zip(columns, heights, strict=True)):
            if height > 0.02 * max(sum(parts.values()) for parts in columns.values()):
                middle = bottoms[column] + height / 2
                plot.text(place, middle, f"{height:.1f}", ha="center", va="center", color="white", fontsize=8)
            bottoms[column] += height
    plot.set_ylabel("ms a chunk")
    plot.set_title(title, fontsize=10)
    plot.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)


def shares(path: str | Path, records: list[dict]) -> None:
    """A bar a kernel record: its share of the ceiling, the best implementation of each row."""
    best: dict[str, tuple[float, str]] = {}
    for entry in records:
        shape = entry["config"] or {}
        if "share_of_ceiling" not in shape:
            continue
        row = entry["name"].removeprefix("kernel_").removesuffix(f"_{shape['implementation']}")
        best[row] = max(best.get(row, (0.0, "")), (shape["share_of_ceiling"], shape["implementation"]))
    figure, plot = axes(8, 1.2 + 0.28 * max(1, len(best)))
    names = list(best)[::-1]
    plot.barh(names, [100 * best[name][0] for name in names])
    for place, name in enumerate(names):
        plot.text(100 * best[name][0], place, f" {best[name][1]}", va="center", fontsize=7)
    plot.set_xlabel("% of the ceiling measured in the same run")
    plot.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=120)
