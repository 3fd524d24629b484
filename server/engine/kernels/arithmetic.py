"""Arithmetic in compiled code: computation in float32, storage in float32 or bfloat16, and the exponential function.

numpy has no bfloat16, so it is stored as uint16: the upper half of a float32's bits. NaN stays NaN, so that callers can
detect it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

REORDERED = {"reassoc", "contract", "arcp", "nsz"}
"""Allows sums in any order, as vector units compute them. Not "fast", which would assume that there is no NaN."""

_LOG2_E = np.float32(1.4426950408889634)
_LOWEST, _HIGHEST = np.float32(-126.0), np.float32(128.0)  # range of float32's exponents; the highest means infinity
_HALF = np.float32(0.5)
# Taylor series of 2 ** f, which for |f| <= 1/2 is accurate to the last digits of float32.
_C1, _C2, _C3 = np.float32(0.69314718), np.float32(0.24022651), np.float32(0.05550411)
_C4, _C5, _C6 = np.float32(0.00961813), np.float32(0.00133336), np.float32(0.00015404)


def widen(number: Any) -> Any:
    """Convert a stored number to float32."""
    raise NotImplementedError("only compiled code calls it")


@overload(widen, inline="always")
def _widen_compiled(number):  # type: ignore[no-untyped-def]
    if isinstance(number, types.Integer):  # bfloat16 is the upper half of a float32
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: np.float32(number)


def narrow(number: Any, array: Any) -> Any:
    """Convert a float32 to an array's stored type, rounding to nearest, ties to even."""
    raise NotImplementedError("only compiled code calls it")


@overload(narrow, inline="always")
def _narrow_compiled(number, array):  # type: ignore[no-untyped-def]
    return (
        (lambda number, array: _to_bfloat16(number))
        if isinstance(array.dtype, types.Integer)
        else (lambda number, array: np.float32(number))
    )


@numba.njit(inline="always")
def _to_bfloat16(number: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@numba.njit(inline="always", fastmath=REORDERED)
def exp(x: Any) -> Any:
    """e ** x, with operations that vector units support; NaN stays NaN."""
    t = x * _LOG2_E
    t = max(t, _LOWEST)
    t = min(t, _HIGHEST)
    whole = np.floor(t + _HALF)
    f = t - whole
    fraction = np.float32(1) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return fraction * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
