"""Compiled loops use no memory after numba has freed it."""

from __future__ import annotations

from pathlib import Path

import server.engine.kernels


def test_no_loop_takes_the_address_of_an_array_that_numba_may_free() -> None:
    """numba frees an array after its last use, though its address is still in use; see `stack_memory`."""
    (directory,) = server.engine.kernels.__path__
    compiled = [path for path in Path(directory).glob("*.py") if "compiler.loop" in path.read_text()]
    assert compiled
    for path in compiled:
        assert ".ctypes" not in path.read_text(), path.name
