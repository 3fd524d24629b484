"""Bodies and replies under /evaluations."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from server.api.jobs.in_process import InServerBody
from server.api.jobs.job_bodies import FILE, both_bodies
from server.api.schemas import RequestBody, Text

FILES = ("data", "references", "shots")
"""Fields that are a file of the form, or the name of a file in PRELUDE_DATA_DIR."""

_NAMED = "a name inside PRELUDE_DATA_DIR; in a form also the file itself."


class EvaluationRequest(RequestBody):
    """Body of POST /evaluations, as JSON or as a form."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"task": "sms_spam", "data": "sms_spam/test.jsonl", "limit": 100}]}
    )

    task: Text = Field(description="The task, or task@version.", max_length=128)
    data: Text | None = Field(None, description=f"The rows, JSONL: {_NAMED}", max_length=1000)
    references: Text | None = Field(None, description=f"Right answers, line by line: {_NAMED}", max_length=1000)
    shots: Text | None = Field(None, description=f"Training data, for k-shot: {_NAMED}", max_length=1000)
    baselines: list[Text] | None = Field(
        None, description="Any of zero-shot, instruction, 4-shot, @2. In a form, separated by commas.", max_length=16
    )
    instruction: Text | None = Field(
        None, description="The instruction of the baselines.", min_length=1, max_length=10_000
    )
    teacher: Text | None = Field(
        None,
        description="A text that contains {input} once, as one more baseline: the soft prompt's teacher, or a text "
        "that it shall replace. The report says on how many rows both choose the same label.",
        min_length=1,
        max_length=100_000,
    )
    teacher_chat: bool | None = Field(None, description="Send that text as a user message.")
    limit: int | None = Field(None, description="Evaluate only this many rows from the beginning.", ge=1)
    compare: list[int] | None = Field(
        None, description="Two versions to compare: is the second better? In a form: 2,3.", min_length=2, max_length=2
    )


def request_body() -> dict[str, Any]:
    """Both body formats for the OpenAPI document; in the form, a field may be a file or the name of a file."""
    schema = EvaluationRequest.model_json_schema()
    text = {name: {"type": "string"} for name in ("baselines", "compare")} | dict.fromkeys(FILES, FILE)
    form = {
        name: {**text[name], "description": field["description"]} if name in text else field
        for name, field in schema["properties"].items()
    }
    return both_bodies(schema, form, ["task", "data"])


class EvaluationBody(InServerBody):
    """One evaluation."""

    version: int
    data: str
    rows: int = Field(description="0 until they are read.")
    contestants: list[str]
    result: dict[str, Any] | None = Field(
        None, description="Once it is done, not in the list: figures with intervals, as `prelude eval --json` has them."
    )


class EvaluationList(BaseModel):
    """GET /evaluations, newest first."""

    evaluations: list[EvaluationBody]
