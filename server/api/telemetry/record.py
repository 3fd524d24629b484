"""The record of a request while it is served: by its handler, for its line in the log and the metrics."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from enum import StrEnum

from fastapi import Request

from server.contracts import Usage
from server.errors import PreludeError, RequestAborted, RequestTimedOut


class RequestOutcome(StrEnum):
    """How a request for an answer ended."""

    FINISHED = "finished"
    ABORTED = "aborted"
    TIMED_OUT = "timed_out"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass
class Record:
    """One HTTP request. Texts and keys have no place in it, so that they cannot get into the log."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """As the client gave it, or a new one; several requests may have the same."""
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    """None if nothing was answered, because the client had gone."""
    generates: bool = False
    """Whether it asks for an answer of the model."""
    task: str | None = None
    version: int | None = None
    outcome: RequestOutcome | None = None
    """Of several texts, that of the first one which did not finish."""
    usage: Usage | None = None
    """Of all texts and choices together."""

    def add(self, outcome: RequestOutcome, usage: Usage) -> None:
        """Note how one text of the request ended, and what it took."""
        if self.outcome in (None, RequestOutcome.FINISHED):
            self.outcome = outcome
        so_far = self.usage or Usage(0, 0, 0)
        self.usage = Usage(
            so_far.virtual_tokens + usage.virtual_tokens,
            so_far.input_tokens + usage.input_tokens,
            so_far.output_tokens + usage.output_tokens,
            so_far.cached_tokens + usage.cached_tokens,
        )


def record_of(request: Request) -> Record:
    """The request's record; a new one where no middleware has made it, as in an app of a few routes."""
    record: Record | None = getattr(request.state, "record", None)
    if record is None:
        record = request.state.record = Record()
    return record


def outcome_of(error: BaseException) -> RequestOutcome:
    """What an error that ended a request means for it; what is no Exception means that nobody waits any more."""
    if isinstance(error, RequestAborted) or not isinstance(error, Exception):
        return RequestOutcome.ABORTED
    if isinstance(error, RequestTimedOut):
        return RequestOutcome.TIMED_OUT
    is_refusal = isinstance(error, PreludeError) and error.status != PreludeError.status
    return RequestOutcome.REFUSED if is_refusal else RequestOutcome.FAILED
