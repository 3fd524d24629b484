"""Runs every query of the Grafana dashboard against a Prometheus, and draws the panels from its answers.

    python -m tests.image.panels http://127.0.0.1:9090 --picture docs/images/dashboard.png

It replaces the dashboard's variables as Grafana does: every server, every task, and a rate interval of four scrapes.
A panel is empty if no series of any of its queries has a finite value. The program lists these and then ends with 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRAPE_SECONDS = 15
VARIABLES = {"$__rate_interval": f"{4 * SCRAPE_SECONDS}s", "$instance": ".*", "$task": ".*"}


@dataclass
class Series:
    """One line of a panel: its name, and its finite values by time in seconds."""

    name: str
    values: dict[float, float]


@dataclass
class Panel:
    """A panel with the answers to its queries and its place in the grid, or the title of a row of panels."""

    title: str
    kind: str
    unit: str
    x: int
    y: int
    width: int
    height: int
    series: list[Series] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw, where something should be."""
        return self.kind != "row" and not any(series.values for series in self.series)


def answers(prometheus: str, seconds: float, dashboard: Path) -> list[Panel]:
    """All panels, with the answers of the last `seconds`."""
    end = time.time()
    found = []
    for raw in json.loads(dashboard.read_text())["panels"]:
        unit = raw.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
        panel = Panel(raw["title"], raw["type"], unit, *(raw["gridPos"][name] for name in "xywh"))
        for target in raw.get("targets", ()):
            panel.series += _query(prometheus, target, end - seconds, end)
        found.append(panel)
    return found


def _query(prometheus: str, target: dict[str, Any], start: float, end: float) -> list[Series]:
    expression = target["expr"]
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    fields = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": 5})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{fields}", timeout=600) as reply:
        result = json.load(reply)["data"]["result"]
    series = []
    for one in result:
        values = {at: float(value) for at, value in one["values"] if math.isfinite(float(value))}
        series.append(Series(_legend(target.get("legendFormat", ""), one["metric"]), values))
    return series


def _legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value).replace("{{ " + name + " }}", value)
    return template or ", ".join(labels.values())


def main(arguments: Sequence[str]) -> int:
    """Print one line per panel; 1 if one is empty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its address, such as http://127.0.0.1:9090")
    parser.add_argument("--dashboard", type=Path, default=Path("deploy/grafana/prelude.json"), help="Grafana's file")
    parser.add_argument("--seconds", type=float, default=300.0, help="how far back to look (300)")
    parser.add_argument("--picture", type=Path, help="a file to draw the panels into")
    options = parser.parse_args(arguments)
    panels = answers(options.prometheus, options.seconds, options.dashboard)
    for panel in (one for one in panels if one.kind != "row"):
        points = sum(len(series.values) for series in panel.series)
        print(f"{'EMPTY' if panel.empty else 'ok':5}  {points:6} points  {panel.title}")
    if options.picture is not None:
        from tests.image.drawing import draw  # Grafana's stand-in has no matplotlib

        draw(panels, options.picture)
    return int(any(panel.empty for panel in panels))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
