"""The checker accepts histories that an order explains, and refuses all others."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.chaos.linearisable import UNKNOWN, Call, NotLinearisable, linearise


def write(began: float, ended: float, value: int) -> Call[int]:
    return Call(began, ended, lambda state: value, text=f"write {value}")


def swap(began: float, ended: float, old: int, new: int) -> Call[int]:
    """Compare-and-swap that has answered yes; of unknown outcome, it may have found another value."""
    otherwise = (lambda state: state) if ended == UNKNOWN else (lambda state: None)
    return Call(began, ended, lambda state: new if state == old else otherwise(state), text=f"swap {old} by {new}")


def read(began: float, ended: float, value: int) -> Call[int]:
    return Call(began, ended, lambda state: state if state == value else None, changes=False, text=f"read {value}")


def is_linearisable(*calls: Call[int]) -> bool:
    try:
        order = linearise(calls, 0)
    except NotLinearisable:
        return False
    state = 0
    for call in order:
        after = call.step(state)
        assert after is not None
        state = after
    return True


def test_a_history_that_an_order_explains_is_accepted() -> None:
    assert is_linearisable()
    assert is_linearisable(write(0, 1, 1), read(2, 3, 1))
    assert is_linearisable(write(0, 10, 1), read(1, 2, 0), read(3, 4, 1)), "the write took effect between both reads"
    assert is_linearisable(write(0, 10, 1), write(0, 10, 2), read(1, 2, 2), read(3, 4, 1))
    assert is_linearisable(swap(0, 9, 1, 2), swap(0, 9, 0, 1), read(10, 11, 2))


def test_a_history_that_no_order_explains_is_refused() -> None:
    assert not is_linearisable(read(0, 1, 1), write(2, 3, 1)), "a read of what is not yet written"
    assert not is_linearisable(write(0, 1, 1), read(2, 3, 0)), "an acknowledged write is lost"
    assert not is_linearisable(write(0, 10, 1), read(1, 2, 1), read(3, 4, 0)), "seen, and then not"
    assert not is_linearisable(swap(0, 9, 0, 1), swap(0, 9, 0, 2)), "two winners"
    assert not is_linearisable(write(0, 10, 1), write(0, 10, 2), read(1, 2, 2), read(3, 4, 1), read(5, 6, 2))


def test_a_call_of_unknown_outcome_has_its_effect_at_any_later_time_or_never() -> None:
    lost = write(0, UNKNOWN, 1)
    assert is_linearisable(lost)
    assert is_linearisable(lost, read(1, 2, 0))
    assert is_linearisable(lost, read(1, 2, 1))
    assert is_linearisable(lost, read(1, 2, 0), write(3, 4, 2), read(5, 6, 2), read(7, 8, 1)), "late"
    assert not is_linearisable(lost, read(1, 2, 1), write(3, 4, 2), read(5, 6, 1)), "but only once"
    assert not is_linearisable(write(5, UNKNOWN, 1), read(1, 2, 1)), "nor before it began"
    assert is_linearisable(swap(0, UNKNOWN, 7, 8), read(1, 2, 0)), "it may have found another value"


def test_a_read_may_be_as_old_as_its_beginning_says() -> None:
    bound = 2.0
    assert is_linearisable(write(0, 1, 1), read(2 - bound, 3, 0))
    assert not is_linearisable(write(0, 1, 1), read(4 - bound, 5, 0))


def test_the_story_of_a_refusal_names_the_calls() -> None:
    with pytest.raises(NotLinearisable, match=r"write 1[^$]*leads to 1, and then none of these fits[^$]*read 0"):
        linearise([write(0, 1, 1), read(2, 3, 0)], 0)


def test_it_agrees_with_a_search_of_all_orders() -> None:
    dice = random.Random(5)
    verdicts = []
    for _ in range(400):
        calls = []
        for _ in range(dice.randint(1, 5)):
            began, value = dice.randrange(6), dice.randrange(3)
            ended = began + dice.randint(1, 4)
            kind = dice.choice([write, read])
            calls.append(kind(began, UNKNOWN if kind is write and dice.random() < 0.3 else ended, value))
        verdicts.append(is_linearisable(*calls))
        assert verdicts[-1] == _explained_by_any_order(calls), calls
    assert 50 < sum(verdicts) < 350


def _explained_by_any_order(calls: list[Call[int]]) -> bool:
    known = {call for call in calls if call.ended != UNKNOWN}
    orders = (order for n in range(len(calls) + 1) for order in itertools.permutations(calls, n))
    return any(known <= set(order) and _explains(order) for order in orders)


def _explains(order: tuple[Call[int], ...]) -> bool:
    if any(later.ended < earlier.began for earlier, later in itertools.combinations(order, 2)):
        return False
    state: int | None = 0
    for call in order:
        state = None if state is None else call.step(state)
    return state is not None


def test_many_concurrent_calls_are_searched_in_a_moment() -> None:
    calls = [write(i / 10, i / 10 + 1, i) for i in range(200)]
    calls += [read(i / 10 + 0.5, i / 10 + 1.5, i) for i in range(200)]
    calls += [write(i, UNKNOWN, 1000 + i) for i in range(20)]
    assert is_linearisable(*calls)
