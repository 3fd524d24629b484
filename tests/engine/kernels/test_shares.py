"""Each unit of work is taken once, and a thread takes those of its own share first."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import numpy as np
import pytest
from numba import carray

from server.engine.kernels.compiler import Compiler
from server.engine.kernels.shares import number_of_thread, taking
from server.engine.kernels.threads import Loop, thread_number
from server.engine.kernels.units import SHARES
from server.engine.kernels.vectors import fetch_add, pointer

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int)


@pytest.fixture(scope="module")
def take() -> Loop:
    """Lists the units in the order in which they were taken, each with the number of the thread."""
    compiler = Compiler("test", keep=False)
    take = taking(compiler)

    def listed(arguments):
        a = carray(arguments, 5 + SHARES)
        taken = carray(pointer(a[2]), (a[1] + 1, 2), np.int64)
        thread, finished = number_of_thread(a[4]), 0
        while True:
            unit, finished = take(a[5:], a[1], a[3], thread, finished)
            if unit < 0:
                break
            row = taken[fetch_add(a)]
            row[0], row[1] = unit, thread

    return compiler.loop(listed)


def taken(loop: Loop, units: int, shares: int, threads: int, thread: int) -> list[tuple[int, int]]:
    """Units and threads in the order in which they were taken, and what lies behind them."""
    out = np.full((units + 1, 2), -1, np.int64)
    loop(units, threads, out.ctypes.data, shares, thread, *[0] * SHARES)
    return [(int(unit), int(number)) for unit, number in out]


@pytest.mark.parametrize("shares", [1, 2, 3, SHARES])
@pytest.mark.parametrize("units", [1, 2, 7, 18, 1000])
def test_every_unit_is_taken_once_on_any_number_of_threads(units: int, shares: int, take: Loop) -> None:
    for threads in (1, 2, 4):
        for _ in range(5):
            units_taken = [unit for unit, _ in taken(take, units, shares, threads, thread_number())]
            assert sorted(units_taken[:-1]) == [*range(units)]
            assert units_taken[-1] == -1


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (1, [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]),
        (2, [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]),
        (4, [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]),  # there are more threads than shares
    ],
)
def test_a_thread_takes_its_own_share_and_then_helps_the_next(number: int, expected: list[int], take: Loop) -> None:
    function: Callable[[], int] = FUNCTION(lambda: number)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    assert [unit for unit, _ in taken(take, 10, 3, 1, address)[:-1]] == expected


def test_threads_have_the_numbers_of_openmp(take: Loop) -> None:
    if not thread_number():
        pytest.skip("no OpenMP")
    numbers: set[int] = set()
    latest = time.monotonic() + 30
    while numbers != {0, 1} and time.monotonic() < latest:  # on a busy machine, a thread may be late many times
        numbers |= {number for _, number in taken(take, 1000, 2, 2, thread_number())[:-1]}
    assert numbers == {0, 1}


def test_without_openmp_the_caller_has_the_first_share(take: Loop) -> None:
    assert taken(take, 4, 2, 1, 0)[:-1] == [(unit, 0) for unit in range(4)]
