"""What a server tells Prometheus, taken apart."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.api.live import LiveServer


@dataclass(frozen=True)
class Scrape:
    """One answer of /metrics."""

    text: str

    @classmethod
    def of(cls, server: LiveServer) -> Scrape:
        """Ask a server."""
        response = server.client.get("/metrics")
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return cls(response.text)

    @property
    def families(self) -> list[Metric]:
        """Everything in it."""
        return list(text_string_to_metric_families(self.text))

    def series(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of a metric's samples by the values of their labels, in the order of the labels' names."""
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name
        }

    def value(self, name: str, *labels: str) -> float:
        """One of them; 0 if there is none."""
        return self.series(name).get(labels, 0.0)

    def tasks(self) -> set[str]:
        """Every value that the label `task` has anywhere."""
        return {
            sample.labels["task"] for family in self.families for sample in family.samples if "task" in sample.labels
        }
