"""The metrics of all replicas as those of one server, each sample with the name of its replica."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Gathered(Collector):
    """Metrics of several replicas, each family once, as the text format requires."""

    def __init__(self, replicas: Mapping[str, Iterable[Metric]]) -> None:
        """`replicas` maps the name of a replica to its metrics."""
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """One family after the other, with the samples of all replicas."""
        families: dict[str, Metric] = {}
        for replica, metrics in self._replicas.items():
            for metric in metrics:
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                family.samples += [
                    sample._replace(labels={**sample.labels, "replica": replica}) for sample in metric.samples
                ]
        yield from families.values()
