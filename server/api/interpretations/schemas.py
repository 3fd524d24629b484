"""Bodies and replies under /interpretations."""

from typing import Literal

from pydantic import BaseModel, Field

from server.api.jobs.in_process import InServerBody
from server.api.jobs.job_bodies import DataRequest
from server.interpret.results import CausalInterpretation

Measure = Literal["sufficiency", "necessity"]


class ExperimentRequest(DataRequest):
    """Body of POST /interpretations."""

    lists = ("measures",)

    measures: list[Measure] | None = Field(
        None, description="Default: all. In a form, separated by commas.", min_length=1, max_length=2
    )


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
