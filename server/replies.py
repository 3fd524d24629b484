"""Reply schemas of the routes for soft prompts and training jobs, shared by the API and the client.

Optional fields are left out of a reply instead of being null.
"""

import sys
from typing import Annotated, Any, Literal, NotRequired, TypeVar, cast

from pydantic import ConfigDict, Field, with_config

from server.validation import without_nulls

if sys.version_info >= (3, 12):
    from typing import TypedDict
else:  # pydantic needs these before Python 3.12
    from typing_extensions import TypedDict

R = TypeVar("R")

_DESCRIBED = with_config(ConfigDict(use_attribute_docstrings=True))

Shares = Annotated[dict[str, int], Field(description="Shares of 100 by version, in a canary.")]


def reply(kind: type[R], **fields: Any) -> R:
    """Build a reply without the fields that are None."""
    return cast(R, without_nulls(fields))


class TaskVersion(TypedDict):
    """A task and one of its versions."""

    task: str
    version: int


class PromptSummary(TypedDict):
    """One entry of GET /prompts. `version` is the live version, if any; in a canary, the one with the largest share."""

    task: str
    version: NotRequired[int]
    traffic: NotRequired[Shares]
    digest: NotRequired[str]
    peft_type: NotRequired[str]
    num_virtual_tokens: NotRequired[int]
    description: NotRequired[str]
    error: NotRequired[str]


class PromptList(TypedDict):
    """A page of tasks; `next` is the `after` of the following page."""

    prompts: list[PromptSummary]
    next: NotRequired[str]


@_DESCRIBED
class PromptDetail(PromptSummary):
    """GET /prompts/{task}."""

    versions: list[int]
    manifest: dict[str, Any]
    """The manifest of the live version; without one, of the newest version."""


@_DESCRIBED
class VersionBody(TypedDict):
    """One version of a task."""

    version: int
    live: bool
    """Whether it answers all or a share of the requests without a version."""
    digest: str
    """Identity of the tensor and the manifest fields that change answers."""
    prefix_hash: str
    """Identity of the tensor alone."""
    peft_type: str
    num_virtual_tokens: int
    bytes: int
    created_at: str
    source: str
    """api or inbox."""
    by: NotRequired[str]
    """Id of the key, or location of the inbox, that published it."""
    description: NotRequired[str]
    metrics: NotRequired[dict[str, Any]]
    error: NotRequired[str]
    """The reason why this server cannot read or serve it, if known."""


@_DESCRIBED
class VersionList(TypedDict):
    """A task's versions, newest first, and the live ones."""

    task: str
    live: NotRequired[int]
    """The live version; in a canary, the one with the largest share."""
    traffic: NotRequired[Shares]
    versions: list[VersionBody]
    next: NotRequired[int]
    """`before` of the following page."""


@_DESCRIBED
class PublishReply(TypedDict):
    """PUT /prompts/{task}. A multitask soft prompt creates several tasks; the fields then describe the first."""

    task: str
    version: int
    digest: str
    peft_type: str
    num_virtual_tokens: int
    live: bool
    tasks: list[TaskVersion]
    warnings: NotRequired[list[str]]
    """Declarations in the files that the server does not use, one sentence each."""
    ignored: NotRequired[list[str]]
    """Files that were sent but not used."""
    manifest: NotRequired[dict[str, Any]]
    """Of a dry run: the manifest that the version would have."""
    prefix_hash: NotRequired[str]
    """Of a dry run: identity of the tensor alone; a version with the same one has the same vectors."""


class JobError(TypedDict):
    """Why a job failed."""

    error: str
    code: str
    remedy: str


class Measurement(TypedDict):
    """The newest measurement on the validation rows; `exact_match` is a share of them."""

    step: int
    loss: float | None
    exact_match: float | None


@_DESCRIBED
class JobBody(TypedDict):
    """A training job as it is now."""

    id: str
    task: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: str
    started_at: NotRequired[str]
    ended_at: NotRequired[str]
    by: NotRequired[str]
    """Id of the key that requested it."""
    queue_position: NotRequired[int]
    """Position of a waiting job; 1 is the next."""
    cancelling: bool
    """Cancellation was requested, but the job has not ended yet."""
    restarts: NotRequired[int]
    """How often it resumed from its checkpoint after it or the server had stopped."""
    phase: NotRequired[str]
    """Phase of its process: loading, reading, teacher, learning_rate, training or writing."""
    step: int
    steps: int
    loss: NotRequired[float]
    tokens_per_second: NotRequired[float]
    seconds_left: NotRequired[float]
    """Estimate from the speed so far."""
    validation: NotRequired[Measurement]
    error: NotRequired[JobError]
    version: NotRequired[int]
    """The version that the job has published."""
    live: bool
    """Whether that version went live at once."""
    metrics: NotRequired[dict[str, Any]]
    """Metrics of the published state, which is the best one measured."""
    spec: dict[str, Any]
    """The request, with all defaults."""


class JobList(TypedDict):
    """All jobs, newest first."""

    jobs: list[JobBody]
