"""What a server answers, as far as a client looks at it; a newer server may add fields."""

from __future__ import annotations

import sys
from typing import Any, Literal, NotRequired

if sys.version_info >= (3, 12):
    from typing import TypedDict
else:  # pydantic reads only these there
    from typing_extensions import TypedDict


class PromptEntry(TypedDict):
    """One task of the list; a broken one has an `error`."""

    task: str
    version: NotRequired[int]
    traffic: NotRequired[dict[str, int]]
    digest: NotRequired[str]
    peft_type: NotRequired[str]
    num_virtual_tokens: NotRequired[int]
    description: NotRequired[str]
    error: NotRequired[str]


class PromptPage(TypedDict):
    """A page of the list; `next` is behind which task the following one starts."""

    prompts: list[PromptEntry]
    next: NotRequired[str]


class Version(TypedDict):
    """One version of a task."""

    version: int
    live: bool
    digest: str
    prefix_hash: str
    peft_type: str
    num_virtual_tokens: int
    bytes: int
    created_at: str
    source: str
    by: NotRequired[str]
    description: NotRequired[str]
    metrics: NotRequired[dict[str, Any]]
    error: NotRequired[str]


class VersionList(TypedDict):
    """The versions of a task, newest first, and what is live. `etag` is what `expect` of the next change takes."""

    task: str
    versions: list[Version]
    live: NotRequired[int | None]
    traffic: NotRequired[dict[str, int]]
    next: NotRequired[int]
    etag: NotRequired[str]


class TaskVersion(TypedDict):
    """A task and one of its versions."""

    task: str
    version: int


class Pushed(TypedDict):
    """What a publish made; `created` is False where nothing had to change."""

    task: str
    version: int
    digest: str
    peft_type: str
    num_virtual_tokens: int
    live: bool
    tasks: list[TaskVersion]
    warnings: NotRequired[list[str]]
    ignored: NotRequired[list[str]]
    created: NotRequired[bool]


class JobError(TypedDict):
    """Why a training job failed."""

    error: str
    code: str
    remedy: str


class Measurement(TypedDict):
    """A measurement on a job's validation rows; `exact_match` is a share of them."""

    step: int
    loss: float | None
    exact_match: float | None


class Job(TypedDict):
    """A training job as it is now; `seconds_left` at the speed so far."""

    id: str
    task: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: str
    cancelling: bool
    step: int
    steps: int
    live: bool
    spec: dict[str, Any]
    queue_position: NotRequired[int]
    phase: NotRequired[str]
    loss: NotRequired[float]
    tokens_per_second: NotRequired[float]
    seconds_left: NotRequired[float]
    validation: NotRequired[Measurement]
    error: NotRequired[JobError]
    version: NotRequired[int]
    metrics: NotRequired[dict[str, Any]]


class JobList(TypedDict):
    """All training jobs, newest first."""

    jobs: list[Job]
