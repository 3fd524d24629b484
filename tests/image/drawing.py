"""Draws the panels of a dashboard where Grafana would place them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, MaxNLocator, MultipleLocator

from tests.image.panels import Panel

GRID_COLUMNS = 24
WIDTH = 16.0
ROW_HEIGHT = 0.31
"""Inches: of the picture, and of a row of the grid."""
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
PAGE, CARD, INK, LINES = "#f4f5f5", "#ffffff", "#24292e", "#e4e7e7"
LEGEND_LETTERS = 110
"""Letters in a line of a legend."""


def draw(panels: Sequence[Panel], picture: Path) -> None:
    """Draw all panels, rows' titles included, into one picture."""
    height = max(panel.y + panel.height for panel in panels)
    times = [at for panel in panels for one in panel.series for at in one.values]
    figure = Figure(figsize=(WIDTH, height * ROW_HEIGHT), facecolor=PAGE)
    for panel in panels:
        top = 1 - panel.y / height
        if panel.kind == "row":
            figure.text(0.008, top - 0.75 / height, panel.title, fontsize=11, fontweight="bold", color=INK)
            continue
        left, bottom = panel.x / GRID_COLUMNS, 1 - (panel.y + panel.height) / height
        _card(figure, left, bottom, panel.width / GRID_COLUMNS, top - bottom)
        figure.text(left + 0.008, top - 0.85 / height, panel.title, fontsize=8.5, fontweight="bold", color=INK)
        if panel.kind == "stat":
            _stat(figure, panel, left + panel.width / GRID_COLUMNS / 2, bottom + 1.4 / height)
            continue
        low = (0.8 + 0.55 * _legend_lines(panel)) / height
        box = (left + 0.04, bottom + low + 0.5 / height, panel.width / GRID_COLUMNS - 0.052, 0.0)
        axes = figure.add_axes((*box[:3], top - 1.35 / height - box[1]))
        _lines(axes, panel)
        if not panel.empty:
            axes.set_xlim(min(times), max(times))
            corner = (left + 0.006, bottom + (0.45 + 0.55 * _legend_lines(panel)) / height)
            axes.legend(
                ncols=_legend_columns(panel), fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=corner,
                bbox_transform=figure.transFigure, handlelength=1.2, columnspacing=1.0, borderpad=0.1,
                borderaxespad=0.0, labelspacing=0.3,
            )  # fmt: skip
    figure.savefig(picture, dpi=90)


def _card(figure: Figure, left: float, bottom: float, width: float, height: float) -> None:
    axes = figure.add_axes((left + 0.003, bottom + 0.0015, width - 0.006, height - 0.003), facecolor=CARD)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(LINES)


def _stat(figure: Figure, panel: Panel, x: float, y: float) -> None:
    last = [(one.name, list(one.values.values())[-1]) for one in panel.series if one.values]
    if not last:
        figure.text(x, y, "no data", ha="center", va="center", fontsize=10, color="#b00020")
        return
    words = [f"{_number(value, panel.unit)} {name}".strip() for name, value in last]
    size = 19 if len(words) == 1 and len(words[0]) < 12 else 13
    text = "\n".join(words if size == 19 or len(words) > 1 else words[0].split(" ", 1)[1].split(" "))
    figure.text(x, y, text, ha="center", va="center", fontsize=size if len(text) < 24 else 9, color=INK)


def _number(value: float, unit: str) -> str:
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{text}/s" if unit in ("reqps", "ops") else text


def _lines(axes: Axes, panel: Panel) -> None:
    axes.tick_params(labelsize=7, length=0, colors="#555")
    axes.grid(color=LINES, linewidth=0.7)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if panel.empty:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="#b00020")
        return
    largest = max(value for one in panel.series for value in one.values.values())
    scale, formatter = _axis(panel.unit, largest)
    for number, one in enumerate(panel.series):
        heights = [value / scale for value in one.values.values()]
        axes.plot(list(one.values), heights, label=one.name, linewidth=1.3, color=COLOURS[number % len(COLOURS)])
    top = largest / scale * 1.15 or 1.0
    axes.set_ylim(-top / 40, top)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(formatter)
    axes.xaxis.set_major_locator(MultipleLocator(60))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{datetime.fromtimestamp(at, UTC):%H:%M}"))
    axes.tick_params(labelsize=7, length=0, colors="#555")
    axes.grid(color=LINES, linewidth=0.7)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend_columns(panel: Panel) -> int:
    longest = max((len(one.name) for one in panel.series), default=1)
    return max(1, LEGEND_LETTERS // (longest + 12))


def _legend_lines(panel: Panel) -> int:
    return -(-len(panel.series) // _legend_columns(panel))


def _axis(unit: str, largest: float) -> tuple[float, Formatter]:
    """What an axis divides its values by, and its labels, as Grafana writes this unit."""
    if unit == "s":
        return 1.0, EngFormatter(unit="s", sep=" ")
    if unit == "percentunit":
        return 0.01, FuncFormatter(lambda value, _: f"{value:.3g} %")
    if unit == "bytes":
        power, name = next(one for one in ((30, "GiB"), (20, "MiB"), (10, "KiB"), (-99, "B")) if largest >= 2 ** one[0])
        return 2.0 ** max(power, 0), FuncFormatter(lambda value, _: f"{value:.4g} {name}")
    return 1.0, FuncFormatter(lambda value, _: _number(value, unit))
