"""Bodies and replies under /interpretations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.jobs.in_process import InServerBody
from server.api.jobs.job_bodies import FILE, both_bodies
from server.api.schemas import RequestBody, Text
from server.interpret.results import CausalInterpretation

FILES = ("data",)
"""The field that is a file of the form, or the name of a file in PRELUDE_DATA_DIR."""

Measure = Literal["sufficiency", "necessity"]


class ExperimentRequest(RequestBody):
    """Body of POST /interpretations, as JSON or as a form."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"task": "sms_spam", "data": "sms_spam/test.jsonl", "limit": 100}]}
    )

    task: Text = Field(description="The task, or task@version.", max_length=128)
    data: Text | None = Field(
        None,
        description="The rows, JSONL: a name inside PRELUDE_DATA_DIR; in a form also the file itself.",
        max_length=1000,
    )
    measures: list[Measure] | None = Field(
        None, description="Default: all. In a form, separated by commas.", min_length=1, max_length=2
    )
    limit: int | None = Field(None, description="Use only this many rows from the beginning.", ge=1)


def request_body(*required: str) -> dict[str, Any]:
    """Both body formats for the OpenAPI document; these fields are required in a form."""
    schema = ExperimentRequest.model_json_schema()
    if "task" not in required:
        schema["required"] = []
        schema["examples"] = [{"data": "sms_spam/test.jsonl", "limit": 100}]
    text = {"measures": {"type": "string"}, "data": FILE}
    form = {
        name: {**text[name], "description": field["description"]} if name in text else field
        for name, field in schema["properties"].items()
    }
    return both_bodies(schema, form, list(required))


class ExperimentBody(InServerBody):
    """Experiments with one soft prompt."""

    version: int
    data: str
    rows: int = Field(description="0 until they are read.")
    measures: list[str]
    result: CausalInterpretation | None = Field(None, description="Once it is done, not in the list.")


class ExperimentList(BaseModel):
    """GET /interpretations, newest first."""

    interpretations: list[ExperimentBody]
