"""Runs compiled loops on torch's own threads, which OpenMP keeps awake between two matrix products.

A loop is a compiled function that takes units of work from a shared counter until none are left. If one thread is late
because its core is busy, the other threads do its share.
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
    """A compiled function of one argument: the address of int64 numbers, first a counter and the number of units.

    Attributes:
        address: of the function.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled  # keeps the machine code alive
        self.address = compiled.address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
        self._locked = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
        self._team = team()

    def __call__(self, units: int, threads: int, *arguments: int) -> None:
        """Run the loop; meanwhile other threads may run Python.

        Args:
            units: number of units of work.
            threads: maximum number of threads, including the caller's.
            *arguments: numbers, and addresses of memory that no other thread writes to meanwhile.
        """
        numbers = array("q", (0, units, *arguments))
        address = numbers.buffer_info()[0]
        if threads > 1 and units > 1 and self._team is not None:
            self._team(self.address, address, min(threads, units), 0)
        else:
            self._alone(address)

    def briefly(self, units: int, *arguments: int) -> None:
        """Run the loop on this thread, without releasing Python's lock; for work of some microseconds.

        An event loop that takes the lock may keep it for milliseconds.
        """
        numbers = array("q", (0, units, *arguments))
        self._locked(numbers.buffer_info()[0])


@functools.cache
def team() -> Team | None:
    """GNU OpenMP's function `GOMP_parallel`, which runs a function on several threads; None if there is none."""
    function = _openmp("GOMP_parallel")
    if function is None:
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    found: Team = function
    return found


@functools.cache
def thread_number() -> int:
    """The address of OpenMP's function that returns the calling thread's number in its team; 0 if there is none."""
    return 0 if team() is None else ctypes.cast(_openmp("omp_get_thread_num"), ctypes.c_void_p).value or 0


def _openmp(name: str) -> Any:
    own = sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))
    for library in (*map(str, own), None):  # None searches the libraries that the process has loaded
        try:
            return getattr(ctypes.CDLL(library), name)
        except (OSError, AttributeError):
            continue
    return None
