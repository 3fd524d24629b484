"""How a request ended is told from what ended it."""

from __future__ import annotations

import asyncio

import pytest

from server.api.telemetry.record import Record, RequestOutcome, outcome_of
from server.contracts import Usage
from server.errors import (
    GenerationFailed,
    InputTooLong,
    NotFinite,
    Overloaded,
    RequestAborted,
    RequestTimedOut,
    ServerDraining,
)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RequestAborted("x"), RequestOutcome.ABORTED),
        (asyncio.CancelledError(), RequestOutcome.ABORTED),
        (GeneratorExit(), RequestOutcome.ABORTED),
        (RequestTimedOut("x"), RequestOutcome.TIMED_OUT),
        (InputTooLong("x"), RequestOutcome.REFUSED),
        (Overloaded("x"), RequestOutcome.REFUSED),
        (ServerDraining("x"), RequestOutcome.REFUSED),
        (GenerationFailed("x"), RequestOutcome.FAILED),
        (NotFinite("x"), RequestOutcome.FAILED),
        (TypeError("x"), RequestOutcome.FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_means_one_outcome(error: BaseException, outcome: RequestOutcome) -> None:
    assert outcome_of(error) is outcome


def test_a_request_of_several_texts_ends_as_the_first_that_did_not_finish_and_adds_up() -> None:
    record = Record()
    for outcome in (RequestOutcome.FINISHED, RequestOutcome.FAILED, RequestOutcome.ABORTED):
        record.add(outcome, Usage(1, 2, 3, 1))
    assert (record.outcome, record.usage) == (RequestOutcome.FAILED, Usage(3, 6, 9, 3))
