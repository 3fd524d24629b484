from __future__ import annotations

import pytest
import torch

from server.interpret.p_values import adjusted, normal_p, p_values, spread


def test_a_monte_carlo_p_value_counts_the_observation_itself() -> None:
    """Otherwise it could be 0, and would be too small (Phipson and Smyth 2010)."""
    null = torch.arange(9.0)
    assert p_values(torch.tensor([9.0, 8.0, 7.5, -1.0]), null).tolist() == pytest.approx([0.1, 0.2, 0.2, 1.0])


def test_p_values_are_adjusted_as_benjamini_and_hochberg_do() -> None:
    p = torch.tensor([0.01, 0.04, 0.03, 0.5], dtype=torch.float64)
    assert adjusted(p).tolist() == pytest.approx([0.04, 0.04 * 4 / 3, 0.04 * 4 / 3, 0.5])
    assert adjusted(torch.tensor([0.9, 1.0])).tolist() == pytest.approx([1.0, 1.0])


def test_the_tail_of_the_normal_distribution() -> None:
    assert normal_p(torch.tensor([0.0, 1.6448536, 8.0])).tolist() == pytest.approx([0.5, 0.05, 6.22e-16], rel=1e-2)


def test_a_spread_holds_percentiles() -> None:
    found = spread(torch.arange(101.0))
    assert (found.mean, found.low, found.high, found.top) == pytest.approx((50, 5, 95, 99))


def test_a_single_draw_has_a_spread_of_zero() -> None:
    """As the effects of one virtual token have, of a soft prompt that has no other."""
    found = spread(torch.tensor([0.25]))
    assert (found.mean, found.sd, found.low, found.high) == (0.25, 0.0, 0.25, 0.25)
