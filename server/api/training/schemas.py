"""Bodies of training jobs."""

from dataclasses import asdict, fields
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic_core import to_json

from server.api.error_format import ErrorFormat
from server.api.jobs.job_bodies import FILE, both_bodies
from server.jobs.job import CONFIG_FIELDS, Job, JobSpec
from server.replies import JobBody, reply
from server.validation import without_nulls

JOBS = "/training/jobs"


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class JobRequest(JobSpec):
    """Body of POST /training/jobs: JSON, or the field `spec` of a form that also uploads the data."""

    data: str | None = None
    """Name of a JSONL file in PRELUDE_DATA_DIR, if none is uploaded."""
    validation: str | None = None
    """The same for validation rows. Default: a tenth of the rows is held out."""

    @property
    def spec(self) -> JobSpec:
        """The job without its data files."""
        return JobSpec(**{field.name: getattr(self, field.name) for field in fields(JobSpec)})


_REQUEST = TypeAdapter(JobRequest)


def parse_request(value: Any) -> JobRequest:
    """Parse a job from JSON (or raise ValidationError). A null field always means that the field is left out."""
    # Validated as JSON, because pydantic's strict mode then accepts a list for a tuple.
    return _REQUEST.validate_json(to_json(_without_nulls(value), inf_nan_mode="constants"), strict=True)


def _without_nulls(value: Any) -> Any:
    found = without_nulls(value)
    return {name: _without_nulls(item) for name, item in found.items()} if isinstance(found, dict) else found


_FIELDS = [*(field.name for field in fields(JobRequest)), *(f"config.{name}" for name in CONFIG_FIELDS)]

JOB_ERRORS = ErrorFormat(JOBS, fields=lambda path: _FIELDS)


_SPEC = TypeAdapter(JobSpec)


def job_body(job: Job) -> JobBody:
    """Render a job as a reply."""
    status, progress = job.status, job.progress
    return reply(
        JobBody,
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
        validation=progress.validation,
        error=None if status.error is None else asdict(status.error),
        version=status.version,
        live=status.live,
        metrics=status.metrics,
        spec=_SPEC.dump_python(job.spec, mode="json", exclude_none=True),
    )


def request_body() -> dict[str, Any]:
    """Both body formats for the OpenAPI document; FastAPI cannot derive two formats for one route."""
    whole = _REQUEST.json_schema()
    form = {
        "spec": {"type": "string", "description": "The same as the JSON body, as text."},
        "data": {**FILE, "description": 'JSONL, each line {"input": "…", "target": "…"}.'},
        "validation": {**FILE, "description": "The same, to measure on."},
    }
    return both_bodies(_as_read(whole, whole.pop("$defs", {})), form, ["spec"])


def _as_read(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema with references resolved, in which optional fields may also be null; see `parse_request`."""
    if isinstance(schema, list):
        return [_as_read(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _as_read(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    found = {name: _as_read(value, definitions) for name, value in schema.items()}
    if "properties" in schema:
        required = schema.get("required", ())
        found["properties"] = {
            name: value if name in required else {"anyOf": [value, {"type": "null"}]}
            for name, value in found["properties"].items()
        }
        found["additionalProperties"] = {"type": "null"}
    return found
