"""numba's compiler, for functions that are created for each shape of numbers, and its cache for them.

numba identifies a cached function by its name, its code and the objects that it refers to. Our loops close over one
another, and those closures pickle differently in every process, so the on-disk cache would never hit. A function is
therefore identified by its name alone, which contains its shape; the name of the directory stands for its code
(`use_kernels`).

In memory too, no two may have one name: numba numbers its own names, and each process starts from zero.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

from server.engine.kernels.arithmetic import REORDERED
from server.engine.kernels.threads import Loop

_OPTIONS = {"fastmath": REORDERED, "error_model": "numpy"}
_SIGNATURE = (types.CPointer(types.int64),), types.void


class Compiler:
    """Compiles the functions of one shape."""

    def __init__(self, *shape: object, keep: bool) -> None:
        """Begin.

        Args:
            *shape: everything that functions of the same name differ by.
            keep: whether the machine code of loops is kept.
        """
        self._shape = "_".join(map(str, shape))
        self._keep = keep

    def inline(self, function: Callable[..., Any]) -> Any:
        """Compile a function that becomes a part of the loops that use it.

        If it were called, the process that has compiled it would call the copy that stands by itself, and a later one
        the copy within the loop that it reads: their sums are in another order, so the same start would not come to
        the same bits twice.
        """
        return numba.njit(nogil=True, forceinline=True, **_OPTIONS)(self._named(function))

    def loop(self, function: Callable[..., Any]) -> Loop:
        """Compile a loop, or read it from where numba keeps it."""
        compiled = (_Kept if self._keep else CFunc)(self._named(function), _SIGNATURE, {}, _OPTIONS)
        with _collection_paused():
            compiled.compile()
        return Loop(compiled)

    def _named(self, function: Callable[..., Any]) -> Callable[..., Any]:
        function.__qualname__ = f"{function.__name__}_{self._shape}"
        return function


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Collect no garbage: collections of what the compiler builds take a quarter of its time, and free nothing yet."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Kept(CFunc):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cache = _Cache(self._pyfunc)


class _Cache(FunctionCache):
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """What this processor and its compiler are; everything else is in the name of the file."""
        return sig, codegen.magic_tuple()
