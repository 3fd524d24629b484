"""Gauges over values that other parts maintain anyway, read at each scrape: queues, caches, the registry.

A separate thread reads them while the engine runs, so the values of one scrape are not a consistent snapshot.
"""

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server import __version__
from server.engine.worker import EngineWorker
from server.jobs.job_queue import JobQueue
from server.jobs.states import count_states
from server.registry.events import KINDS
from server.registry.registry import Registry


class Gauges(Collector):
    """A Prometheus collector over the worker and the registry."""

    def __init__(self, worker: EngineWorker, registry: Registry, job_queue: JobQueue | None) -> None:
        self._job_queue = job_queue
        self._worker = worker
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """The current values."""
        yield self._build()
        yield from self._engine()
        yield from self._prefixes()
        yield from self._soft_prompts()
        yield from self._tasks()
        yield from self._jobs()

    def _build(self) -> Metric:
        model = self._worker.model
        about = {"version": __version__, "model": model.name, "dtype": model.dtype, "device": model.device}
        build = GaugeMetricFamily("prelude_build_info", "1; what runs is in the labels.", labels=list(about))
        build.add_metric(list(about.values()), 1)
        return build

    def _engine(self) -> Iterator[Metric]:
        worker, slots, scheduler = self._worker, self._worker.slots, self._worker.scheduler
        is_ready = worker.responsive and not worker.draining
        used = sum(slot.length for slot in slots.used)
        yield _gauge("ready", "1 while new requests are taken and the engine steps, else 0.", is_ready)
        yield _gauge("requests_running", "Choices that have a slot; most requests have one.", len(scheduler.running))
        yield _gauge("requests_waiting", "Choices that wait for a slot.", len(scheduler.waiting))
        yield _counter("engine_steps", "Forwards of the model.", worker.num_steps)
        yield _gauge("kv_cache_positions", "Positions that the KV cache has.", slots.num_positions)
        yield _gauge("kv_cache_used_positions", "Positions in slots that are handed out.", used)
        yield _gauge("shared_input_bytes", "Memory for copies of shared inputs.", scheduler.shared.num_bytes)
        yield _gauge("shared_input_budget_bytes", "Memory that they may take.", scheduler.shared.budget_bytes)

    def _prefixes(self) -> Iterator[Metric]:
        cache = self._worker.prefixes
        yield _gauge("prefix_cache_bytes", "Memory that computed prefixes take.", cache.num_bytes)
        yield _gauge("prefix_cache_budget_bytes", "Memory that they may take.", cache.budget_bytes)
        yield _gauge("prefix_cache_entries", "Computed prefixes.", len(cache))
        yield _counter("prefix_cache_hits", "Choices that found their prefix computed.", cache.hits)
        yield _counter("prefix_cache_misses", "Choices that had to compute it; a publish is one.", cache.misses)
        yield _counter("prefix_cache_evictions", "Prefixes that were dropped for want of memory.", cache.evicted)

    def _soft_prompts(self) -> Iterator[Metric]:
        cache = self._registry.host
        yield _gauge("soft_prompt_cache_bytes", "Memory that soft prompts themselves take.", cache.num_bytes)
        yield _gauge("soft_prompt_cache_budget_bytes", "Memory that they may take.", cache.budget_bytes)
        yield _gauge("soft_prompt_cache_entries", "Soft prompts in memory.", len(cache))
        yield _counter("soft_prompt_cache_hits", "Requests that found theirs in memory.", cache.hits)
        yield _counter("soft_prompt_load_failures", "Soft prompts that could not be read or used.", cache.failures)

    def _tasks(self) -> Iterator[Metric]:
        registry = self._registry
        yield _gauge("tasks", "Tasks that have versions.", registry.num_tasks)
        yield _gauge("tasks_broken", "Tasks, or entries of the inbox, with something not served.", registry.num_errors)
        changes = CounterMetricFamily(
            "prelude_changes", "Changes of tasks since the start, other servers' included.", labels=["kind"]
        )
        for kind in KINDS:
            changes.add_metric([kind], registry.changes[kind])
        yield changes

    def _jobs(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("prelude_training_jobs", "Training jobs that are kept.", labels=["state"])
        for state, count in count_states(self._job_queue.files.states().values() if self._job_queue else ()).items():
            jobs.add_metric([state.value], count)
        yield jobs


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"prelude_{name}", about, value=float(value))


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"prelude_{name}", about, value=float(value))
