"""Plots and tabulates the figures of quality.py: quality against the number of trained parameters.

    python benchmarks/quality_plot.py
    python benchmarks/quality_plot.py --points quality.jsonl --out quality.svg

The style is in pictures.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pictures
from pictures import AMBER, BLUE, GREEN, INK, RED, VIOLET
from quality import POINTS, TRAINED, UNTRAINED, Point, read_points

OUT = Path(__file__).parents[1] / "docs" / "images" / "quality.svg"
STYLES = {
    "prompt_tuning": (BLUE, "o", "prompt tuning"),
    "prefix_tuning": (GREEN, "s", "prefix tuning"),
    "lora": (AMBER, "D", "LoRA"),
    "full": (RED, "^", "full fine-tuning"),
}
"""Colour, marker and name of each method."""
LINES = {"zero-shot": ":", "4-shot": "--"}
TITLES = {"accuracy_choices": "accuracy", "bleu": "BLEU"}


def shown(point: Point, value: float) -> float:
    """The displayed value: shares in percent, BLEU unchanged."""
    return value if point.metric == "bleu" else 100 * value


def median_point(points: Sequence[Point]) -> tuple[float, float, float]:
    """Value and interval: for one seed, its own; for several seeds, their median and range."""
    values = [shown(point, point.value) for point in points]
    if len(points) == 1:
        return values[0], shown(points[0], points[0].low), shown(points[0], points[0].high)
    return statistics.median(values), min(values), max(values)


def group(points: Iterable[Point]) -> dict[str, dict[str, list[Point]]]:
    """Group points by task and method, in display order."""
    found: dict[str, dict[str, list[Point]]] = {}
    points = list(points)
    for way in (*UNTRAINED, *TRAINED):
        for point in points:
            if point.way == way:
                found.setdefault(point.task, {}).setdefault(way, []).append(point)
    return found


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw one panel for each task, side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    tasks = group(points)
    with pictures.style():
        figure = Figure(figsize=(5 * len(tasks), 4.6), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for panel, (name, ways) in zip(panels, tasks.items(), strict=True):
            pictures.prepare_panel(panel)
            draw_task(panel, ways)
            first = next(iter(ways.values()))[0]
            title = f"{name}: {TITLES[first.metric]} on {first.rows:,} test rows"
            panel.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
            unit = "" if first.metric == "bleu" else " %"
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: f"{value:g}{unit}"))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
            panel.set_xlabel("numbers that were trained (violet: none)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False, handlelength=2.4)
        pictures.save(figure, path)


def draw_task(panel: Any, ways: dict[str, list[Point]]) -> None:
    """Draw one task's points."""
    for way, line in LINES.items():
        if way in ways:
            value, _, _ = median_point(ways[way])
            panel.axhline(value, color=VIOLET, linestyle=line, linewidth=1.6, label=way)
    for method, (color, mark, name) in STYLES.items():
        found = [points for way, points in ways.items() if way.partition("-")[0] == method]
        if not found:
            continue
        x = [points[0].parameters for points in found]
        y, low, high = zip(*map(median_point, found), strict=True)
        spread = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        panel.errorbar(x, y, spread, color=color, marker=mark, markersize=7, linewidth=1.8, capsize=3, label=name)
        for points, across, up in zip(found, x, y, strict=True):
            label = points[0].way.partition("-")[2]
            if label:
                panel.annotate(label, (across, up), (6, -12), textcoords="offset points", color=color, fontsize=8.5)


def magnitude(value: float) -> str:
    """A short form of a parameter count."""
    for size, name in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"


def table(points: Sequence[Point]) -> str:
    """The points as a Markdown table."""
    tasks = group(points)
    counts = {point.way: point.parameters for point in points}
    rows = [["", "trained numbers", *(f"`{name}`" for name in tasks)], ["---"] * (2 + len(tasks))]
    for way in (*UNTRAINED, *TRAINED):
        if way not in counts:
            continue
        cells = []
        for ways in tasks.values():
            figures = median_point(ways[way]) if way in ways else None
            cells.append("" if figures is None else "{:.1f} ({:.1f} to {:.1f})".format(*figures))
        rows.append([way, f"{counts[way]:,}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=POINTS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    points = read_points(options.points)
    draw(points, options.out)
    print(table(points))


if __name__ == "__main__":
    main()
