"""Publishes a job's result as a version of its task, on the same path as an upload."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.errors import UnknownTask
from server.jobs.folder import JobFolder, job_not_kept
from server.jobs.job import Job
from server.registry.events import content_of
from server.registry.registry import Registry
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class Outcome:
    """Which version a job's result is, and whether it answers."""

    version: int
    live: bool
    metrics: dict[str, Any] | None


class Withdrawn(Exception):
    """The job was cancelled before its result was published."""


def publish_result(registry: Registry, folder: JobFolder, job: Job, check: Callable[[], None]) -> Outcome:
    """Publish what a job has learned, live if its rule holds, else staged.

    If the server is killed in this function, the next server calls it again. A version with the same content is
    therefore treated as the one that this job published. `check` raises if the job's key may no longer publish.

    Raises:
        Withdrawn: the job was cancelled before anything was published.
        PreludeError: the result does not fit the frozen model, or the store cannot be written.
    """
    if not folder.publishing.exists():
        _claim(folder, check)
    [soft_prompt] = load_soft_prompts(folder.result, registry.model, registry.max_virtual_tokens)
    metrics = soft_prompt.manifest.metrics
    task, activate = job.spec.task, job.spec.activates(metrics)
    version = _published(registry, task, soft_prompt)
    if version is None:
        _claim(folder, check)
        published = registry.publish(task, [soft_prompt], "api", by=job.by, activate=activate)
        return Outcome(published.tasks[0].version, published.live, metrics)
    live = version in dict(registry.task(task).traffic)
    if activate and not live:
        _claim(folder, check)
        registry.activate(task, version, by=job.by)
    return Outcome(version, activate or live, metrics)


def _claim(folder: JobFolder, check: Callable[[], None]) -> None:
    """Mark the job as being published (see `JobFolder`), after which it cannot be cancelled.

    Raises:
        Withdrawn: it was cancelled first.
        PreludeError: it may no longer publish, or its folder cannot be written.
    """
    check()
    try:
        folder.publishing.touch()
    except OSError as exc:
        raise job_not_kept(exc) from exc
    if folder.cancel.exists():
        folder.publishing.unlink(missing_ok=True)
        raise Withdrawn


def _published(registry: Registry, task: str, soft_prompt: SoftPrompt) -> int | None:
    """The newest version of this very content, manifest included."""
    registry.sync()
    identity = content_of(soft_prompt, "").identity
    with contextlib.suppress(UnknownTask):
        versions = registry.task(task).versions
        return max((n for n, version in versions.items() if version.content.identity == identity), default=None)
    return None
