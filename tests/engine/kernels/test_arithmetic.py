"""Numbers in compiled code are torch's: stored, rounded, and as exponents of e."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch

from server.engine.kernels.arithmetic import REORDERED, exp, narrow, widen


@numba.njit(fastmath=REORDERED)
def widened(numbers: Any) -> Any:
    out = np.empty(len(numbers), np.float32)
    for i in range(len(numbers)):
        out[i] = widen(numbers[i])
    return out


@numba.njit(fastmath=REORDERED)
def narrowed(numbers: Any, stored: Any) -> None:
    for i in range(len(numbers)):
        stored[i] = narrow(numbers[i], stored)


@numba.njit(fastmath=REORDERED)
def powers(x: Any) -> Any:
    out = np.empty(len(x), np.float32)
    for i in range(len(x)):
        out[i] = exp(x[i])
    return out


def test_every_bfloat16_is_widened_as_by_torch_and_narrowed_to_itself() -> None:
    stored = np.arange(1 << 16).astype(np.uint16)
    wide = widened(stored)
    torchs = torch.from_numpy(stored).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide.view(np.uint32), torchs.view(np.uint32))
    back = np.empty_like(stored)
    narrowed(wide, back)
    np.testing.assert_array_equal(back, stored)


def test_what_lies_between_is_rounded_as_by_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    bits[:1000] = bits[:1000] & 0xFFFF0000 | 0x8000  # in the middle between two
    numbers = bits.view(np.float32)
    numbers = numbers[~np.isnan(numbers)]
    got = np.empty(len(numbers), np.uint16)
    narrowed(numbers, got)
    expected = torch.from_numpy(numbers).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(got, expected)


def test_a_float32_is_stored_as_it_is() -> None:
    numbers = np.random.default_rng(0).normal(size=99).astype(np.float32)
    got = np.empty_like(numbers)
    narrowed(widened(numbers), got)
    np.testing.assert_array_equal(got, numbers)


def test_e_is_raised_to_the_power_of_any_number() -> None:
    x = np.linspace(-87, 88, 300_001).astype(np.float32)
    np.testing.assert_allclose(powers(x), np.exp(x.astype(np.float64)), rtol=5e-6)
    small = x[abs(x) < 1]
    np.testing.assert_allclose(powers(small), np.exp(small.astype(np.float64)), rtol=3e-7)
    assert powers(np.zeros(1, np.float32))[0] == 1


@pytest.mark.parametrize("length", [1, 7, 16, 40])
def test_what_has_no_power_in_range_is_none_or_infinity_and_what_is_no_number_stays_so(length: int) -> None:
    """On its own, and in vectors."""
    nothing = powers(np.full(length, -np.inf, np.float32))
    assert ((nothing >= 0) & (nothing < 2e-38)).all()
    assert (powers(np.full(length, -1e30, np.float32)) < 2e-38).all()
    assert (powers(np.full(length, np.inf, np.float32)) == np.inf).all()
    assert (powers(np.full(length, 100, np.float32)) == np.inf).all()
    assert np.isnan(powers(np.full(length, np.nan, np.float32))).all()
