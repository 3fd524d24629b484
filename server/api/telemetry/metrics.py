"""Prometheus metrics that requests update. Values that are only read at a scrape are in `gauges.py`.

Each app has its own Prometheus registry. An observation takes about a microsecond, on the event loop; the engine is not
involved. The time between tokens has no task label: all tasks in a batch share its steps, so it is the same for all.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.api.telemetry.gauges import Gauges
from server.api.telemetry.record import TOKENS, RequestOutcome
from server.api.telemetry.task_labels import OTHER, UNKNOWN, TaskLabels
from server.contracts import Usage
from server.engine.worker import EngineWorker
from server.executors import Executor
from server.jobs.job_queue import JobQueue
from server.registry.registry import Registry

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

MILLISECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
REQUEST_BUCKETS = (*MILLISECONDS, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10, 60)
LOAD_BUCKETS = (*MILLISECONDS, 1, 2.5, 5, 10, 30)

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT"})
"""Methods with their own label value; a client may send any word as its method."""


class Metrics(Collector):
    """All values of /metrics; `loads` may be observed on any thread."""

    def __init__(
        self, worker: EngineWorker, tasks: Registry, most_tasks: int, job_queue: JobQueue | None = None
    ) -> None:
        """Create the metrics, all zero; at most `most_tasks` tasks have a label value of their own."""
        self.registry = CollectorRegistry()
        self.gather: Callable[[], Awaitable[Collector]] | None = None
        """Collects what a scrape shows, if that is more than this server's own metrics."""
        self._labels = TaskLabels(most_tasks, tasks.answering, self._forget)
        self._requests = self._counter("requests", "Requests for an answer, by how they ended.", "version", "outcome")
        texts = {
            "input_tokens": "Tokens of texts, templates included.",
            "virtual_tokens": "Virtual tokens in front of texts.",
            "cached_tokens": "Those of the virtual tokens whose keys and values were known already.",
            "output_tokens": "Generated tokens, counted when their request ends.",
        }
        self._tokens = {name: self._counter(name, texts[name]) for name in TOKENS}
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the arrival of a request to its first token."
        )
        self._duration = self._histogram(
            "request_duration_seconds", "From the arrival of a request that finished to its last token."
        )
        self._queue = self._histogram("queue_seconds", "From the acceptance of a request that finished to its slot.")
        self.inter_token = self._histogram("inter_token_seconds", "Between two tokens of a choice.", (), TOKEN_BUCKETS)
        about = "Reading a soft prompt from the store."
        self.loads = self._histogram("soft_prompt_load_seconds", about, (), LOAD_BUCKETS)
        labels = ("method", "route", "status")
        self._http = Counter("prelude_http_requests", "HTTP requests of all routes.", labels, registry=self.registry)
        self.registry.register(Gauges(worker, tasks, job_queue))
        ProcessCollector(registry=self.registry)

    def first_token(self, task: str | None, seconds: float) -> None:
        """Record a request's time to first token."""
        self._first_token.labels(self._labels.of(task, None)[0]).observe(seconds)

    def ended(
        self, task: str | None, version: int | None, outcome: RequestOutcome, usage: Usage, seconds: float
    ) -> None:
        """Record the end of a request that had reached the engine."""
        name, number = self._labels.of(task, version)
        self._requests.labels(name, number, outcome).inc()
        if outcome is RequestOutcome.REFUSED:
            return
        for field, counter in self._tokens.items():
            counter.labels(name).inc(getattr(usage, field))
        if outcome is RequestOutcome.FINISHED:
            self._duration.labels(name).observe(seconds)
            self._queue.labels(name).observe(usage.queued_seconds)

    def never_began(self, outcome: RequestOutcome) -> None:
        """Record the end of a generation request that never reached the engine."""
        self._requests.labels(UNKNOWN, "", outcome).inc()

    def answered(self, method: str, route: str | None, status: int | None) -> None:
        """Record an HTTP request; `status` is None if the client disconnected before the reply."""
        known = method if method in METHODS else OTHER
        self._http.labels(known, route or OTHER, "none" if status is None else status).inc()

    async def scrape(self, threads: Executor) -> bytes:
        """All metrics as text, rendered on another thread, because there may be thousands of lines."""
        self._labels.forget_deleted()
        return await threads.run(generate_latest, self if self.gather is None else await self.gather())

    def collect(self) -> Iterator[Metric]:
        """The metrics without the `_created` samples, which would double the number of lines of counters."""
        for metric in self.registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"prelude_{name}", about, ["task", *labels], registry=self.registry)

    def _histogram(
        self, name: str, about: str, labels: Sequence[str] = ("task",), buckets: Sequence[float] = REQUEST_BUCKETS
    ) -> Histogram:
        return Histogram(f"prelude_{name}", about, labels, registry=self.registry, buckets=buckets)

    def _forget(self, task: str, version: str | None) -> None:
        if version is not None:
            self._requests.remove_by_labels({"task": task, "version": version})
            return
        for metric in (self._requests, self._first_token, self._duration, self._queue, *self._tokens.values()):
            metric.remove_by_labels({"task": task})
