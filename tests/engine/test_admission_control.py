"""What is over a limit is refused at once, what ends makes room, and a refusal leaves nothing counted."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest

from server.contracts import GenerationRequest
from server.engine.admission_control import Admission, Limits
from server.errors import Overloaded


def asked(task: str | None = None, key_id: str | None = None, n: int = 1) -> GenerationRequest:
    return GenerationRequest("r", (1,), task=task, key_id=key_id, n=n)


def test_choices_count_each() -> None:
    admission = Admission(Limits(in_flight=8))
    over = pytest.raises(Overloaded, match="8 answers are in flight, and the server takes 8")
    with admission.of(asked(n=5)), admission.of(asked(n=3)), over:
        admission.of(asked()).__enter__()
    labels = replace(asked(), labels=((1,), (2,)))
    with admission.of(labels), admission.of(asked(n=6)), pytest.raises(Overloaded):
        admission.of(asked()).__enter__()


def test_whoever_ends_makes_room_also_by_an_error() -> None:
    admission = Admission(Limits(in_flight=1, per_task=1, per_key=1))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.of(asked("a", "k")):
            raise ZeroDivisionError
    with admission.of(asked("a", "k")):
        pass
    assert not admission._by_task
    assert not admission._by_key


@pytest.mark.parametrize(
    ("limits", "full", "free"),
    [
        (Limits(per_task=2), asked("busy", "k"), asked("quiet", "k")),
        (Limits(per_key=2), asked("t", "greedy"), asked("t", "modest")),
    ],
)
def test_one_task_or_key_at_its_limit_does_not_stop_another(
    limits: Limits, full: GenerationRequest, free: GenerationRequest
) -> None:
    admission = Admission(limits)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(admission.of(full))
        with pytest.raises(Overloaded, match=r"busy|greedy"):
            stack.enter_context(admission.of(full))
        stack.enter_context(admission.of(free))


def test_a_request_larger_than_the_limit_is_taken_when_nothing_else_is_there() -> None:
    admission = Admission(Limits(in_flight=2))
    with admission.of(asked(n=5)), pytest.raises(Overloaded):
        admission.of(asked()).__enter__()


def test_requests_without_a_key_share_no_limit_of_keys() -> None:
    admission = Admission(Limits(per_key=1))
    with admission.of(asked()), admission.of(asked()):
        pass


def test_what_runs_in_the_background_takes_no_room_of_live_requests_and_has_a_share_of_its_own() -> None:
    admission = Admission(Limits(in_flight=4, per_task=4, per_key=4, background=2))
    background = replace(asked("t", "k", n=2), is_background=True)
    with admission.of(background):
        with pytest.raises(Overloaded, match="in the background"):
            admission.of(background).__enter__()
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(admission.of(asked("t", "k")))
    with admission.of(asked(n=3)), pytest.raises(Overloaded, match="3 answers are in flight"):
        admission.of(background).__enter__()
    huge = replace(asked(n=6000), is_background=True)
    with admission.of(huge), admission.of(asked("t", "k")):
        pass
