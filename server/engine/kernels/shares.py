"""Gives each thread a share of a loop's units of work, the same share every time.

What a thread has written is in its own core's cache. A thread that writes the same columns in every layer finds these
lines there, and two threads seldom write to one line. A thread that has finished its share helps with the others.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from server.engine.kernels.compiler import Compiler
from server.engine.kernels.vectors import fetch_add


@intrinsic
def number_of_thread(_: Any, function: Any) -> Any:
    """The result of OpenMP's `omp_get_thread_num`, which is at an address; 0 if the address is 0."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        there = builder.icmp_unsigned("!=", arguments[0], i64(0))
        before = builder.block
        with builder.if_then(there):
            called = builder.call(builder.inttoptr(arguments[0], ir.FunctionType(i32, []).as_pointer()), [])
            number, inside = builder.zext(called, i64), builder.block
        result = builder.phi(i64)
        result.add_incoming(i64(0), before)
        result.add_incoming(number, inside)
        return result

    return types.int64(types.int64), code


def taking(compiler: Compiler) -> Any:
    """The function that takes a unit of work."""

    @compiler.inline
    def take(counters, units, shares, own, finished):
        """Take a unit from a thread's own share, or from a later one after `finished` shares have no unit left.

        Returns the unit, or -1 if no share has one, and the new number of finished shares.
        """
        while finished < shares:
            share = (own + finished) % shares
            unit = share * units // shares + fetch_add(counters[share:])
            if unit < (share + 1) * units // shares:
                return unit, finished
            finished += 1
        return -1, finished

    return take
