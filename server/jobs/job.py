"""A training job: its request, its progress and its end. Free of torch and of HTTP."""

from __future__ import annotations

import datetime
import re
import secrets
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from server.soft_prompts.manifest import SystemMessage
from server.train.config import TrainingConfig

JOB_ID = re.compile(r"\d{8}t\d{9}-[0-9a-f]{12}")

CONFIG_FIELDS = tuple(field.name for field in fields(TrainingConfig))

Metric = Literal["validation_exact_match", "validation_loss"]


def now() -> str:
    """The current time as an ISO 8601 string."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def new_job_id() -> str:
    """An id that sorts by the time of its making, and that cannot be guessed from others."""
    at = datetime.datetime.now(datetime.UTC)
    return f"{at:%Y%m%dt%H%M%S}{at.microsecond // 1000:03d}-{secrets.token_hex(6)}"


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class ActivateIf:
    """A condition on a metric: if it holds, the result goes live, otherwise it is staged."""

    metric: Metric
    at_least: float | None = Field(default=None, allow_inf_nan=False)
    at_most: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _has_a_bound(self) -> ActivateIf:
        if self.at_least is None and self.at_most is None:
            raise ValueError("needs at_least or at_most")
        low, high = self.at_least, self.at_most
        if low is not None and high is not None and low > high:
            raise ValueError("at_least is above at_most, so no value keeps to both")
        if self.metric == "validation_exact_match" and ((low or 0) > 1 or (high is not None and high < 0)):
            raise ValueError("exact match is a share from 0 to 1, so no value keeps to this bound")
        return self

    def holds(self, value: object) -> bool:
        """Whether the measured value satisfies the condition; a metric that was not measured does not."""
        if not isinstance(value, int | float):
            return False
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class JobSpec:
    """What is asked for, beside the data."""

    task: str
    config: TrainingConfig = Field(default_factory=TrainingConfig)
    input_template: str = "{input}\n"
    """What the model reads; {input} is the row's input."""
    system_message: SystemMessage | None = None
    """What the task does with a chat's system message: ignore, refuse, or template, which needs {system} there."""
    description: str | None = None
    """One line about the task, shown by GET /prompts."""
    licence: str | None = None
    """Of the data; kept in the manifest."""
    max_new_tokens: int = Field(default=64, ge=1, le=4096)
    """Of a teacher's answers, in distillation."""
    activate: bool | ActivateIf = False
    """Whether the result goes live when it is published: true, false, or a condition on a metric. A result that does
    not go live is staged and can be activated later."""

    def activates(self, metrics: dict[str, Any] | None) -> bool:
        """Whether a result of these metrics is to answer."""
        if isinstance(self.activate, bool):
            return self.activate
        return self.activate.holds((metrics or {}).get(self.activate.metric))


class JobState(StrEnum):
    """The state of a job. The states `preparing` and `aborted` occur only for jobs that run in the server process."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABORTED = "aborted"

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self not in (JobState.QUEUED, JobState.PREPARING, JobState.RUNNING)


@dataclass(frozen=True)
class DataNames:
    """The data files' names, as the client sent them."""

    data: str
    validation: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why a job failed, in the form of every error."""

    error: str
    code: str
    remedy: str


@checked_dataclass(frozen=True)
class Status:
    """What the server knows of a job; replaced whole whenever it changes."""

    state: JobState = JobState.QUEUED
    started_at: str | None = None
    ended_at: str | None = None
    restarts: int = 0
    """How often its process was started again."""
    deaths: int = 0
    """How often its process has been killed since the record last grew."""
    recorded: int = 0
    """Number of steps in the record when it was last killed."""
    pid: int | None = None
    created: float | None = None
    """Creation time of the process, because the system may have given its pid to another process since."""
    error: Failure | None = None
    version: int | None = None
    live: bool = False
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True)
class JobProgress:
    """How far a running job has come, as its last line says."""

    phase: str = ""
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    validation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """A job as it is at one moment."""

    id: str
    spec: JobSpec
    names: DataNames
    by: str | None
    """Id of the key that requested it."""
    created_at: str
    status: Status
    progress: JobProgress = field(default_factory=JobProgress)
    is_cancelling: bool = False
    queue_position: int | None = None
    """Place in the queue; 1 is the next job to run."""

    @property
    def task(self) -> str:
        """The task that it trains."""
        return self.spec.task

    @property
    def state(self) -> JobState:
        """How far it has come."""
        return self.status.state
