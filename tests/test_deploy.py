"""What ships for Prometheus and Grafana fits the metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from server.api.telemetry.metrics import Metrics
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.registry.registry import Registry
from server.registry.store import Store
from tests.promtool import needs_promtool, promtool
from tests.registry.fakes import MemoryObjects
from tests.support import make_engine

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "prelude.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
PROCESS = {
    f"process_{name}" for name in ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "start_time_seconds")
}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


@pytest.fixture(scope="module")
def known(tiny: FrozenModel) -> set[str]:
    """Names of all series."""
    registry = Registry(Store(MemoryObjects()), tiny.spec, 512)
    metrics = Metrics(EngineWorker(make_engine(tiny)), registry, 10)
    families = [family for family in metrics.collect() if family.name.startswith("prelude_")]
    assert len(families) > 25
    return {family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, ("",))} | PROCESS


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return board


def expressions() -> list[str]:
    """Every query of the dashboard."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def names_in(text: str) -> set[str]:
    """Metrics that are named; not those of other words, such as a job's name or a file's."""
    return set(re.findall(r"\b(?:prelude|process)_[a-z_]+", text))


def test_the_dashboard_asks_only_for_metrics_that_there_are(known: set[str]) -> None:
    variables = [variable.get("definition", "") for variable in dashboard()["templating"]["list"]]
    named = {name for text in [*expressions(), *variables] for name in names_in(text)}
    assert named - known == set()


def test_every_metric_is_on_the_dashboard(known: set[str]) -> None:
    shown = {name for text in expressions() for name in names_in(text)}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known - PROCESS}
    assert bases - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_the_dashboard_is_laid_out_without_gaps_and_overlaps() -> None:
    panels = dashboard()["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert len(cells) == 24 * (1 + max(y for _, y in cells))
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        *("Now", "Traffic", "Latency", "Caches", "Swaps", "Process")
    ]


def test_every_panel_says_what_it_shows_and_asks_the_source_that_was_chosen() -> None:
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@needs_promtool
def test_promtool_can_read_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "5m").replace("$instance", ".*")}
        for number, expr in enumerate(expressions())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(path))


def test_alerts_ask_only_for_metrics_that_there_are(known: set[str]) -> None:
    assert names_in(ALERTS.read_text()) - known == set()


def test_the_page_on_operations_tells_every_alert_and_its_severity() -> None:
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()
    documented = re.findall(r"^\| `(Prelude\w+)` \| (\w+) \|", page, re.MULTILINE)
    alerts = re.findall(r"alert: (\w+)\n.*?severity: (\w+)", ALERTS.read_text(), re.DOTALL)
    assert sorted(documented) == sorted(alerts)


def test_every_alert_is_tested_to_fire_and_to_be_silent() -> None:
    tests = ALERTS.with_name("alerts_test.yml").read_text()
    for alert in re.findall(r"alert: (\w+)", ALERTS.read_text()):
        assert re.search(rf"alertname: {alert}, exp_alerts: \[\]", tests)
        assert re.search(rf"alertname: {alert}\n\s+exp_alerts:\n", tests)


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("check", "rules", str(ALERTS))
    promtool("test", "rules", str(ALERTS.with_name("alerts_test.yml")))
