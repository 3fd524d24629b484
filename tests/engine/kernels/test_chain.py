"""A chain runs each unit of each loop once, and no loop before all units of the one before are done."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numba import carray

from server.engine.kernels.chain import chain_loop
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.threads import Loop
from server.engine.kernels.units import LinkColumns
from server.engine.kernels.vectors import fetch_add, pointer

SCHED_YIELD = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


@pytest.fixture(scope="module")
def sum_up() -> Loop:
    """Writes to each unit's place one more than the largest number of the loop before."""

    def sum_up(arguments: Any) -> None:
        a = carray(arguments, 4)
        before, after = carray(pointer(a[2]), a[1], np.int64), carray(pointer(a[3]), a[1], np.int64)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            smallest = before[0]
            for i in range(a[1]):
                smallest = min(smallest, before[i])
            after[unit] += smallest + 1

    return Compiler("test", keep=False).loop(sum_up)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("units", [1, 2, 37])
def test_loops_run_in_order_and_each_unit_once(units: int, threads: int, sum_up: Loop) -> None:
    chain, length = chain_loop(keep=False), 50
    for _ in range(10):
        places = np.zeros((length + 1, units), np.int64)
        arguments = np.zeros((length, 4), np.int64)
        links = np.zeros((length, len(LinkColumns._fields)), np.int64)
        for i in range(length):
            arguments[i] = 0, units, places[i].ctypes.data, places[i + 1].ctypes.data
            links[i, :2] = sum_up.address, arguments[i].ctypes.data
        chain(threads, threads, length, links.ctypes.data, SCHED_YIELD)
        assert (places == np.arange(length + 1)[:, None]).all()
