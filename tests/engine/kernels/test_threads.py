"""A loop does each unit of its work exactly once, whoever calls it and on however many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numba import carray

from server.engine.kernels import threads as module
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.threads import Loop
from server.engine.kernels.vectors import fetch_add, pointer


@pytest.fixture(scope="module")
def count() -> Loop:
    """Adds one to the number that belongs to a unit."""

    def count(arguments):
        a = carray(arguments, 3)
        done = carray(pointer(a[2]), a[1], np.int64)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            done[unit] += 1

    return Compiler("test", keep=False).loop(count)


def counted(loop: Loop, units: int, threads: int) -> list[int]:
    """How often each unit was done, and the number behind the last one."""
    done = np.zeros(units + 1, np.int64)
    loop(units, threads, done.ctypes.data)
    return done.tolist()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("units", [0, 1, 2, 3, 100_000])
def test_every_unit_is_done_once(units: int, threads: int, count: Loop) -> None:
    for _ in range(20):
        assert counted(count, units, threads) == [1] * units + [0]


def test_every_unit_is_done_once_for_each_of_several_callers(count: Loop) -> None:
    with ThreadPoolExecutor(4) as callers:
        for done in callers.map(lambda threads: counted(count, 500, threads), [1, 2, 3, 4] * 50):
            assert done == [1] * 500 + [0]


@pytest.mark.parametrize(("units", "threads", "asked"), [(3, 2, [2]), (3, 8, [3]), (3, 1, []), (1, 4, []), (0, 4, [])])
def test_no_more_threads_are_woken_than_there_are_units(
    units: int, threads: int, asked: list[int], count: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    team, woken = module.team(), []
    if team is None:
        pytest.skip("no OpenMP")

    def recorded(address: int, arguments: int, number: int, flags: int) -> None:
        woken.append(number)
        team(address, arguments, number, flags)

    monkeypatch.setattr(count, "_team", recorded)
    assert counted(count, units, threads) == [1] * units + [0]
    assert woken == asked


def test_without_openmp_the_caller_does_everything(count: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "team", lambda: None)
    alone = Loop(count._compiled)
    assert alone._team is None
    assert counted(alone, 100, 4) == [1] * 100 + [0]


def test_a_library_without_the_function_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert module.team.__wrapped__() is None
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert module.team.__wrapped__() is None
