"""Bodies of training jobs."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic_core import to_json

from server.jobs.job import CONFIG_FIELDS, Job, JobSpec
from server.validation import without_nulls

JOBS = "/training/jobs"


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class JobRequest(JobSpec):
    """POST /training/jobs, as a JSON body, or as the field `spec` of a form that brings the data along."""

    data: str | None = None
    """Name of a JSONL file in PRELUDE_DATA_DIR, if none is uploaded."""
    validation: str | None = None
    """The same for rows to measure on. Default: a tenth of the rows is held out."""

    @property
    def spec(self) -> JobSpec:
        """What is asked for, without the data."""
        return JobSpec(**{field.name: getattr(self, field.name) for field in fields(JobSpec)})


_REQUEST = TypeAdapter(JobRequest)


def parse_request(value: Any) -> JobRequest:
    """A job from what JSON holds. Fields that are null count as left out; null never means anything else.

    Raises:
        ValidationError: a field is missing, unknown, or not what it must be.
    """
    # As JSON, not as Python: strict mode then takes a list for a tuple.
    return _REQUEST.validate_json(to_json(_without_nulls(value), inf_nan_mode="constants"), strict=True)


def _without_nulls(value: Any) -> Any:
    found = without_nulls(value)
    return {name: _without_nulls(item) for name, item in found.items()} if isinstance(found, dict) else found


JOB_FIELDS = [*(field.name for field in fields(JobRequest)), *(f"config.{name}" for name in CONFIG_FIELDS)]


class JobError(BaseModel):
    """Why a job failed."""

    error: str
    code: str
    remedy: str


class Measurement(BaseModel):
    """The newest measurement on the validation rows."""

    step: int
    loss: float | None
    exact_match: float | None


class JobBody(BaseModel):
    """A training job as it is now."""

    id: str
    task: str
    state: str = Field(description="queued, running, succeeded, failed or cancelled.")
    created_at: str
    started_at: str | None = None
    ended_at: str | None = None
    by: str | None = Field(None, description="Id of the key that it was asked for with.")
    queue_position: int | None = Field(None, description="Of one that waits; 1 is the next.")
    cancelling: bool = Field(description="It is to end, and has not yet.")
    restarts: int = Field(description="How often it went on from its checkpoint, because it or the server was ended.")
    phase: str | None = Field(
        None, description="Of its process: loading, reading, teacher, learning_rate, training or writing."
    )
    step: int
    steps: int
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = Field(None, description="At the speed so far.")
    validation: Measurement | None = None
    error: JobError | None = None
    version: int | None = Field(None, description="What it has published.")
    live: bool = Field(description="Whether that version answered as soon as it was published.")
    metrics: dict[str, Any] | None = Field(None, description="Of the state that was published: the best one measured.")
    spec: dict[str, Any] = Field(description="What was asked for, with the defaults filled in.")


class JobList(BaseModel):
    """All jobs, newest first."""

    jobs: list[JobBody]


_SPEC = TypeAdapter(JobSpec)


def job_body(job: Job) -> JobBody:
    """A job as it is shown."""
    status, progress = job.status, job.progress
    return JobBody(
        id=job.id,
        task=job.spec.task,
        state=status.state.value,
        created_at=job.created_at,
        started_at=status.started_at,
        ended_at=status.ended_at,
        by=job.by,
        queue_position=job.queue_position,
        cancelling=job.is_cancelling,
        restarts=status.restarts,
        phase=progress.phase or None if status.state == "running" else None,
        step=progress.step,
        steps=job.spec.config.steps,
        loss=progress.loss,
        tokens_per_second=progress.tokens_per_second,
        seconds_left=progress.seconds_left if status.state == "running" else None,
        validation=None if progress.validation is None else Measurement(**progress.validation),
        error=None if status.error is None else JobError(**asdict(status.error)),
        version=status.version,
        live=status.live,
        metrics=status.metrics,
        spec=_SPEC.dump_python(job.spec, mode="json", exclude_none=True),
    )


def request_body() -> dict[str, Any]:
    """For OpenAPI: the body in both of its forms, which FastAPI cannot tell of one route."""
    whole = _REQUEST.json_schema()
    spec = _with_nulls(_inlined(whole, whole.pop("$defs", {})))
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "required": ["spec"],
        "additionalProperties": False,
        "properties": {
            "spec": {"type": "string", "description": "The same as the JSON body, as text."},
            "data": {**file, "description": 'JSONL, each line {"input": "…", "target": "…"}.'},
            "validation": {**file, "description": "The same, to measure on."},
        },
    }
    content = {"application/json": {"schema": spec}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references: in OpenAPI they would have to lie elsewhere."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(value, definitions) for name, value in schema.items()}


def _with_nulls(schema: Any) -> Any:
    """A schema in which fields of objects may be null, if they may be left out; see `parse_request`."""
    if isinstance(schema, list):
        return [_with_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _with_nulls(value) for name, value in schema.items()}
    if "properties" in schema:
        required = schema.get("required", ())
        found["properties"] = {
            name: value if name in required else {"anyOf": [value, {"type": "null"}]}
            for name, value in found["properties"].items()
        }
        found["additionalProperties"] = {"type": "null"}
    return found
