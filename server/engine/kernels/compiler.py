"""numba's compiler and its on-disk cache, for functions that are created for each shape.

numba identifies a cached function by its name, its code and its closure. Prelude's loops close over one another, and
these closures pickle differently in every process, so the on-disk cache would never hit. A function is therefore
identified only by its name, which contains its shape; the cache directory's name identifies the code (`use_kernels`).

Names must be unique in memory too: numba's own names contain a counter, which starts from zero in each process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, UserProvidedCacheLocator
from numba.core.ccallback import CFunc

from server.engine.kernels.arithmetic import REORDERED
from server.engine.kernels.threads import Loop
from server.garbage import collection_paused

_OPTIONS = {"fastmath": REORDERED, "error_model": "numpy"}
_SIGNATURE = (types.CPointer(types.int64),), types.void


class Compiler:
    """Compiles the functions of one shape."""

    def __init__(self, *shape: object, keep: bool) -> None:
        """Take everything in which functions of the same name differ; `keep` caches the loops' machine code on disk."""
        self._shape = "_".join(map(str, shape))
        self._keep = keep

    def inline(self, function: Callable[..., Any]) -> Any:
        """Compile a function that is always inlined into its loops, so that a first start sums as a second one does."""
        return numba.njit(nogil=True, forceinline=True, **_OPTIONS)(self._named(function))

    def loop(self, function: Callable[..., Any]) -> Loop:
        """Compile a loop, or load it from numba's cache."""
        compiled = (_Kept if self._keep else CFunc)(self._named(function), _SIGNATURE, {}, _OPTIONS)
        with collection_paused():  # collections would take a quarter of the compiler's time
            compiled.compile()
        return Loop(compiled)

    def _named(self, function: Callable[..., Any]) -> Callable[..., Any]:
        function.__qualname__ = f"{function.__name__}_{self._shape}"
        return function


class _Kept(CFunc):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cache = _Cache(self._pyfunc)


class _Place(UserProvidedCacheLocator):
    """One place for all copies of Prelude: numba's would depend on where the source file is."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        return "loops"

    def get_source_stamp(self) -> str:
        """The directory's name contains it."""
        return ""


class _Files(CompileResultCacheImpl):
    _locator_classes: list[type[object]] = [_Place]  # noqa: RUF012 - as the base class declares it


class _Cache(FunctionCache):
    _impl_class = _Files

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """The processor and compiler; the file's name contains everything else."""
        return sig, codegen.magic_tuple()
