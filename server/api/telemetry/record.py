"""The record of a request, which its handler fills for the log line and the metrics."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from fastapi import Request

from server.contracts import Usage
from server.errors import PreludeError, RequestAborted, RequestTimedOut

if TYPE_CHECKING:
    from server.api.telemetry.spans import Trace


class RequestOutcome(StrEnum):
    """How a generation request ended."""

    FINISHED = "finished"
    ABORTED = "aborted"
    TIMED_OUT = "timed_out"
    FAILED = "failed"
    REFUSED = "refused"


TOKENS = ("input_tokens", "virtual_tokens", "cached_tokens", "output_tokens")
"""The numbers of tokens in `Usage`, each of which has a field in the log and a counter."""


@dataclass
class Record:
    """One HTTP request. The record never contains texts or keys, so they cannot get into the log."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The client's id, or a new one; several requests may have the same id."""
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    """The reply's status; None if the client disconnected before the reply."""
    generates: bool = False
    """Whether the request asks the model to generate."""
    task: str | None = None
    version: int | None = None
    outcome: RequestOutcome | None = None
    """How the request ended; for several texts, the outcome of the first text that did not finish."""
    usage: Usage | None = None
    """The usage of all texts and choices together."""
    trace: Trace | None = None
    """The request's span, if the server sends traces."""

    _tasks: set[str | None] = field(default_factory=set)

    def answered_by(self, task: str | None, version: int | None) -> None:
        """Record what answers a text of the request; no task is named once several answer."""
        self._tasks.add(task)
        self.task, self.version = (task, version) if len(self._tasks) == 1 else (None, None)

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self.started

    def add(self, outcome: RequestOutcome, usage: Usage) -> None:
        """Add the outcome and usage of one text of the request."""
        if self.outcome in (None, RequestOutcome.FINISHED):
            self.outcome = outcome
        before = self.usage or Usage(0, 0, 0)
        self.usage = Usage(**{name: getattr(before, name) + getattr(usage, name) for name in TOKENS})


def record_of(request: Request) -> Record:
    """The request's record; a new one if no middleware has made it, for example in an app with a few routes."""
    record: Record | None = getattr(request.state, "record", None)
    if record is None:
        record = request.state.record = Record()
    return record


def outcome_of(error: BaseException) -> RequestOutcome:
    """The outcome of a request that ended with this error; a BaseException means that the client is gone."""
    if isinstance(error, RequestAborted) or not isinstance(error, Exception):
        return RequestOutcome.ABORTED
    if isinstance(error, RequestTimedOut):
        return RequestOutcome.TIMED_OUT
    is_refusal = isinstance(error, PreludeError) and error.status != PreludeError.status
    return RequestOutcome.REFUSED if is_refusal else RequestOutcome.FAILED
