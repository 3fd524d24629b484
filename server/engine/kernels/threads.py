"""Compiled loops on torch's own threads.

Between two matrix products a loop must begin within microseconds, so it runs on the threads that torch's OpenMP keeps
awake for the next product: a second pool would put two threads onto every core, of which one always sleeps when it is
needed. numba's own threads are such a pool.

A loop is a compiled function that takes units of work from a counter until there are none. The first thread takes
the next: if one thread is late, because its core is busy with something else, the others do its share.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Team = Callable[[int, int, int, int], None]


class Loop:
    """A compiled function of one argument: where int64 numbers begin, first a counter and the number of units."""

    def __init__(self, compiled: Any) -> None:
        """Take what `numba.cfunc` made."""
        self._compiled = compiled  # whose code lives as long as it does
        self._address = compiled.address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
        self._team = team()

    def __call__(self, units: int, threads: int, *arguments: int) -> None:
        """Do a number of units of work, on at most a number of threads, the caller's included.

        Args:
            units: of work.
            threads: at most.
            *arguments: numbers, and addresses of memory that nobody else writes to meanwhile.
        """
        numbers = array("q", (0, units, *arguments))
        address = numbers.buffer_info()[0]
        if threads > 1 and units > 1 and self._team is not None:
            self._team(self._address, address, min(threads, units), 0)
        else:
            self._alone(address)


@functools.cache
def team() -> Team | None:
    """OpenMP's function that runs another one on several threads, as GNU's compiler calls it; None without one."""
    own = sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))
    for library in (*map(str, own), None):  # None is whatever this process has loaded
        try:
            found = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        found.restype = None
        return found
    return None
