"""Intervals: known cases, the same each time, and differences that see what two contestants have in common."""

from __future__ import annotations

import numpy as np
import pytest

from server.evaluation.intervals import DRAWN_AT_ONCE, Bootstrap
from server.evaluation.metrics import macro_f1, share


def test_an_interval_is_as_wide_as_theory_says() -> None:
    hits = [True] * 200 + [False] * 200
    found = Bootstrap(400).estimate(share(hits))
    spread = 1.96 * (0.5 * 0.5 / 400) ** 0.5
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - spread, abs=0.01)
    assert found.high == pytest.approx(0.5 + spread, abs=0.01)


def test_an_interval_covers_what_is_true_about_95_times_of_100() -> None:
    dice = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        found = Bootstrap(100, resamples=300).estimate(share(list(dice.random(100) < 0.7)))
        covered += found.low <= 0.7 <= found.high
    assert 180 <= covered <= 198


def test_rows_that_are_all_the_same_leave_no_doubt() -> None:
    found = Bootstrap(50).estimate(share([True] * 50))
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_an_interval_is_the_same_each_time_also_when_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = share([index**0.5 for index in range(90)])
    first = Bootstrap(90).estimate(hits)
    assert Bootstrap(90).estimate(hits) == first
    assert Bootstrap(90, seed=1).estimate(hits) != first
    assert DRAWN_AT_ONCE > 90 * 1000
    monkeypatch.setattr("server.evaluation.intervals.DRAWN_AT_ONCE", 90 * 7)
    assert Bootstrap(90).estimate(hits) == first


def test_a_difference_on_the_same_rows_is_surer_than_two_figures() -> None:
    # The second is right wherever the first is, and on ten rows more of 400.
    one = [index < 200 for index in range(400)]
    other = [index < 210 for index in range(400)]
    bootstrap = Bootstrap(400)
    difference = bootstrap.difference(share(one), share(other))
    assert difference.value == pytest.approx(0.025)
    assert 0 < difference.low < 0.025 < difference.high < 0.05
    assert bootstrap.estimate(share(one)).high > bootstrap.estimate(share(other)).low, "apart they overlap"


def test_identical_answers_differ_by_nothing() -> None:
    targets, predicted = [0, 1, 1, 0, 1], [0, 1, 0, None, 1]
    found = Bootstrap(5).difference(macro_f1(targets, predicted, 2), macro_f1(targets, predicted, 2))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_a_resample_without_a_label_is_no_division_by_zero() -> None:
    found = Bootstrap(2).estimate(macro_f1([0, 1], [0, None], 2))
    assert (found.low, found.value, found.high) == (0.0, 0.5, 1.0)
