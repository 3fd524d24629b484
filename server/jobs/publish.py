"""From a job's result to a version of its task: through the one publish path, as an upload goes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from server.errors import UnknownTask
from server.jobs.folder import JobFolder
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


def publish_result(registry: Registry, folder: JobFolder, job: Job) -> Outcome:
    """Publish what a job has learned, live if its rule holds, else staged.

    A server that was killed in here does it again, so a version of this very content is taken for the one that it
    published.

    Raises:
        PreludeError: it is not one for this model (any more), or the store refuses.
    """
    [soft_prompt] = load_soft_prompts(folder.result, registry.model, registry.max_virtual_tokens)
    metrics = soft_prompt.manifest.metrics
    task, activate = job.spec.task, job.spec.activates(metrics)
    version = _published(registry, task, soft_prompt)
    if version is None:
        published = registry.publish(task, [soft_prompt], "api", by=job.by, activate=activate)
        return Outcome(published.tasks[0].version, published.live, metrics)
    live = version in dict(registry.task(task).traffic)
    if activate and not live:
        registry.activate(task, version, by=job.by)
    return Outcome(version, activate or live, metrics)


def _published(registry: Registry, task: str, soft_prompt: SoftPrompt) -> int | None:
    """The newest version of this very content, manifest included."""
    registry.sync()
    identity = content_of(soft_prompt, "").identity
    with contextlib.suppress(UnknownTask):
        versions = registry.task(task).versions
        return max((n for n, version in versions.items() if version.content.identity == identity), default=None)
    return None
