"""Runs loops one after another on the same threads, so that a whole step wakes them once.

All loops take their units of work from a counter. A thread that finds no unit left waits until the threads inside the
loop have finished theirs, and enters the next loop. If a thread is late because another program uses its core, the
others wait for it only while it computes a unit; it later passes the finished loops without doing anything.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.engine.kernels.compiler import Compiler
from server.engine.kernels.threads import Loop
from server.engine.kernels.units import LinkColumns
from server.engine.kernels.vectors import pointer

SPINS = 2000
"""How often a thread looks for the others before it lets another program use its core."""

_I64 = ir.IntType(64)


LINK = LinkColumns(*range(len(LinkColumns._fields)))


@intrinsic
def _call_loop(_: Any, function: Any, arguments: Any) -> Any:
    """Call the function at an address with an address."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64])
        builder.call(builder.inttoptr(given[0], kind.as_pointer()), [given[1]])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), code


@intrinsic
def _load_now(_: Any, array: Any) -> Any:
    """Load the first number of an int64 array, after everything that was loaded before."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(address, "seq_cst", 8)

    return types.int64(array), code


@intrinsic
def _count(_: Any, array: Any) -> Any:
    """Increment the first number of an int64 array, after everything before and before everything after."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", address, _I64(1), "seq_cst")

    return types.int64(array), code


@intrinsic
def _pause(_: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.none(), code


@functools.cache
def chain_loop(*, keep: bool) -> Loop:
    """Compile the loop that runs loops, on an x86 processor.

    Its number of units is ignored. It takes the number of links, the address of their table (see `LinkColumns`), and
    the address of libc's `sched_yield`.
    """
    compiler = Compiler(keep=keep)

    @compiler.loop
    def chain(arguments):
        a = carray(arguments, 5)
        links = carray(pointer(a[3]), (a[2], len(LINK)), np.int64)
        for i in range(a[2]):
            link = links[i]
            _count(link[LINK.entered :])
            _call_loop(link[LINK.function], link[LINK.arguments])
            _count(link[LINK.left :])
            # No units are left, so a thread that has not entered yet will compute nothing in this loop.
            spins = 0
            while True:
                left = _load_now(link[LINK.left :])
                if left == _load_now(link[LINK.entered :]):
                    break
                spins += 1
                if spins % SPINS == 0:
                    _call_loop(a[4], 0)
                _pause()

    return chain
