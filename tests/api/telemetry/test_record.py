"""How a request ended is told from what ended it."""

from __future__ import annotations

import asyncio

import pytest

from server.api.telemetry.record import Outcome, Record, outcome_of
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
        (RequestAborted("x"), Outcome.ABORTED),
        (asyncio.CancelledError(), Outcome.ABORTED),
        (GeneratorExit(), Outcome.ABORTED),
        (RequestTimedOut("x"), Outcome.TIMED_OUT),
        (InputTooLong("x"), Outcome.REFUSED),
        (Overloaded("x"), Outcome.REFUSED),
        (ServerDraining("x"), Outcome.REFUSED),
        (GenerationFailed("x"), Outcome.FAILED),
        (NotFinite("x"), Outcome.FAILED),
        (TypeError("x"), Outcome.FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_means_one_outcome(error: BaseException, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


def test_a_request_of_several_texts_ends_as_the_first_that_did_not_finish_and_adds_up() -> None:
    record = Record()
    for outcome in (Outcome.FINISHED, Outcome.FAILED, Outcome.ABORTED):
        record.add(outcome, Usage(1, 2, 3, 1))
    assert (record.outcome, record.usage) == (Outcome.FAILED, Usage(3, 6, 9, 3))
