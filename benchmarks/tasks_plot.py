"""Plots the figures of tasks.py: throughput, time to first token and hits by the number of tasks.

    python benchmarks/tasks.py | tail -n 1 > tasks.json
    python benchmarks/tasks_plot.py tasks.json docs/images/tasks.svg

The style is in pictures.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pictures
from pictures import AMBER, BLUE, GREEN, INK, RED

STYLES = {
    ("all", "uniform"): (BLUE, "o", "-", 4.0, "room for all prefixes, even choices"),
    ("all", "zipf"): (GREEN, "s", "-", 1.6, "room for all prefixes, Zipf choices"),
    ("quarter", "zipf"): (AMBER, "D", "--", 1.8, "room for a quarter, Zipf choices"),
    ("quarter", "uniform"): (RED, "^", "--", 1.8, "room for a quarter, even choices"),
}
"""Colour, marker, line style, width and name; the first two lines overlap, so the lower one is wider."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw three panels, one below the other, with a common axis of tasks."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    base, *rows = result["rows"]
    counts = [1, *sorted({row["tasks"] for row in rows})]
    with pictures.style():
        figure = Figure(figsize=(8, 8.4), layout=ConstrainedLayoutEngine(hspace=0.06, h_pad=0.08))
        panels = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": (1.25, 1, 1)})
        for panel in panels:
            pictures.prepare_panel(panel)
        for key, (color, marker, line, width, label) in STYLES.items():
            found = [row for row in rows if (row["budget"], row["choice"]) == key]
            if not found:
                continue
            one = {"tasks": 1, **{name: base[name] for name in ("ratio", "first_token_p50_ms", "hit_rate")}}
            found = [one, *found] if key[0] == "all" else found
            style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line, "linewidth": width}
            style |= {"markersize": 4 + width, "label": label}
            x = [row["tasks"] for row in found]
            panels[0].plot(x, [100 * row["ratio"] for row in found], **style)
            panels[1].plot(x, [row["first_token_p50_ms"] for row in found], **style)
            panels[2].plot(x, [100 * row["hit_rate"] for row in found], **style)
        titles = (
            "Output tokens per second, of what a server with one task gives",
            "Time to the first token, median",
            "Requests that find their prefix computed",
        )
        units = ("%", "ms", "%")
        for panel, title, unit in zip(panels, titles, units, strict=True):
            panel.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: f"{value:,.0f} {unit}"))
        panels[0].set_ylim(0, max(110.0, panels[0].get_ylim()[1]))
        panels[2].set_ylim(0, 108)
        panels[2].xaxis.set_major_locator(FixedLocator(counts))
        panels[2].xaxis.set_minor_locator(NullLocator())
        panels[2].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panels[2].set_xlabel("registered soft prompts")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, handlelength=3.2)
        figure.supxlabel(caption(result), fontsize=8.5, x=0.01, ha="left", color=INK)
        pictures.save(figure, path)


def caption(result: dict[str, Any]) -> str:
    """The caption: what was measured."""
    return (
        f"{result['model']}, {result['dtype']}, {result['machine']}; {result['clients']} clients, "
        f"{result['output_tokens']} tokens out on average,\n{result['num_virtual_tokens']} virtual tokens a task, "
        f"Zipf exponent {result['zipf_exponent']}; medians of {result['rounds']} rounds of {result['seconds']:g} s"
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
