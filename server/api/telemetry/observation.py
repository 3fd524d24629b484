"""Observes a request while the engine answers it; replies do not pass through this module."""

import time

from fastapi import Request

from server.api.generation import Prepared
from server.api.telemetry.metrics import Metrics
from server.api.telemetry.record import RequestOutcome, outcome_of, record_of
from server.contracts import Delta, Usage


class Observation:
    """Observes one engine request from submission to end."""

    def __init__(self, request: Request, prepared: Prepared) -> None:
        """Start observing an engine request of this HTTP request, before it is submitted."""
        self._metrics: Metrics = request.app.state.metrics
        self._record = record = record_of(request)
        self._prepared = prepared
        self._submitted = time.perf_counter()
        self._first: float | None = None  # time of the first token
        self._last: dict[int, float] = {}  # choice -> time of its last token
        self._num_tokens = 0
        self._usage: Usage | None = None
        self._has_ended = False
        resolved = prepared.resolved
        self._task = None if resolved is None else resolved.task
        self._version = None if resolved is None else resolved.version
        record.answered_by(self._task, self._version)

    def take(self, delta: Delta) -> None:
        """Record a delta."""
        if delta.token is not None:
            now = time.perf_counter()
            last = self._last.get(delta.index)
            if last is not None:
                self._metrics.inter_token.observe(now - last)
            elif not self._last:
                self._first = now
                self._metrics.first_token(self._task, self._record.seconds)
            self._last[delta.index] = now
            self._num_tokens += 1
        if delta.usage is not None and (self._usage is None or delta.index == 0):
            self._usage = delta.usage
        if delta.finish_reason is not None and delta.is_last:
            self._end(RequestOutcome.FINISHED)  # not when the generator is closed, because that looks like an abort

    def fail(self, error: BaseException) -> None:
        """Record the outcome of a failed request, unless it has already ended."""
        self._end(outcome_of(error))

    def _end(self, outcome: RequestOutcome) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        usage, record = self._total(outcome), self._record
        record.add(outcome, usage)
        if record.trace is not None and outcome is not RequestOutcome.REFUSED:
            record.trace.add_text(usage, self._submitted, self._first, time.perf_counter())
        self._metrics.ended(self._task, self._version, outcome, usage, record.seconds)

    def _total(self, outcome: RequestOutcome) -> Usage:
        """The usage of all choices together. They share the input, and the first choice reports its usage."""
        if outcome is RequestOutcome.REFUSED:
            return Usage(0, 0, 0)
        first = self._usage or Usage(0, 0, 0)
        soft_prompt = self._prepared.soft_prompt
        return Usage(
            virtual_tokens=0 if soft_prompt is None else soft_prompt.num_virtual_tokens,
            input_tokens=len(self._prepared.request.input_ids),
            output_tokens=self._num_tokens,
            cached_tokens=first.cached_tokens,
            queued_seconds=first.queued_seconds,
            prefix_seconds=first.prefix_seconds,
        )
