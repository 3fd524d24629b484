"""Bodies and replies under /evaluations."""

from typing import Any

from pydantic import BaseModel, Field

from server.api.jobs.in_process import InServerBody
from server.api.jobs.job_bodies import NAMED, DataRequest
from server.api.schemas import Text


class EvaluationRequest(DataRequest):
    """Body of POST /evaluations."""

    files = ("data", "references", "shots")
    lists = ("baselines", "compare")

    references: Text | None = Field(None, description=f"Right answers, line by line: {NAMED}", max_length=1000)
    shots: Text | None = Field(None, description=f"Training data, for k-shot: {NAMED}", max_length=1000)
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
    compare: list[int] | None = Field(
        None, description="Two versions to compare: is the second better? In a form: 2,3.", min_length=2, max_length=2
    )


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
