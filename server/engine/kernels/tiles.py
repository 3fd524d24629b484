"""AMX: matrix products of bfloat16 in the processor's tile registers, and what is done to their results.

A tile holds up to 16 rows of 64 bytes. One instruction multiplies a tile of 16 rows and 32 columns by a tile of
weights, and adds the product to a tile of 16 rows and 16 columns in float32. It adds up in the same order whatever the
number of rows, so a row's result does not depend on other rows.

oneDNN remembers how it has configured each thread's tiles. Loops that use them therefore restore its configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.engine.kernels.compiler import Compiler
from server.engine.kernels.units import BIAS, GATE, RESIDUAL
from server.engine.kernels.vectors import FUSED, VectorCode, pointer

HAS_TILES = bool(get_host_cpu_features().get("amx-bf16") and get_host_cpu_features().get("avx512bf16"))
"""Whether the processor has tiles; the process must also have asked the kernel for them."""

TILE_BYTES = 1024
"""Of a tile of weights."""

_I8, _I32, _I64, _FLOAT, _NOTHING = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
_BYTES = _I8.as_pointer()
_SUMS, _ROWS, _WEIGHTS = 0, 4, 6
"""The first tile of sums (four), of rows (two) and of weights (two)."""

LOG2_E = 1.4426950408889634
EXPONENTIAL = (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00961813, 0.00133336, 0.00015404)
"""Taylor series of 2 ** f, as in `arithmetic.py`."""


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def _moved(builder: Any, address: Any, offset: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), _BYTES)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    function_type = ir.FunctionType(_NOTHING, [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"llvm.x86.{name}"), arguments)


@intrinsic
def load_configuration(_: Any, address: Any) -> Any:
    """Configure the thread's tiles as the 64 bytes at an address say, and clear them."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", builder.inttoptr(arguments[0], _BYTES))
        return context.get_dummy_value()

    return types.none(types.int64), code


@intrinsic
def store_configuration(_: Any, address: Any) -> Any:
    """Write the configuration of the thread's tiles to 64 bytes at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "sttilecfg", builder.inttoptr(arguments[0], _BYTES))
        return context.get_dummy_value()

    return types.none(types.int64), code


@intrinsic(prefer_literal=True)
def multiply_tiles(_, high, terms, x, x_step, weights, depth, sums):
    """Compute `sums` `[high * 16, 16]`, float32, of rows of `x` and 16 columns of weights; all are addresses.

    Args:
        high: number of tiles of rows, a constant of 1 to 4.
        terms: a constant, the number of tiles whose sum is a tile of weights, 1 or 2.
        x: rows of bfloat16.
        x_step: bytes from one row to the next.
        weights: `[terms, depth]` tiles.
        depth: number of tiles in a row of `x`.
        sums: where the result is.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_step, weights, depth, sums = arguments[2:]
        sums = [_moved(builder, sums, _I64(TILE_BYTES * row)) for row in range(high.literal_value)]
        parts = range(terms.literal_value)
        for row in range(len(sums)):
            _call(builder, "tilezero", _I8(_SUMS + row))
        with cgutils.for_range(builder, depth, intp=_I64) as loop:
            for part in parts:
                tile = builder.add(loop.index, builder.mul(depth, _I64(part)))
                at = _moved(builder, weights, builder.mul(tile, _I64(TILE_BYTES)))
                _call(builder, "tileloadd64", _I8(_WEIGHTS + part), at, _I64(64))
            start = builder.add(x, builder.mul(loop.index, _I64(64)))
            for first in range(0, len(sums), 2):  # no product waits for the one before it
                rows = range(first, min(first + 2, len(sums)))
                for row in rows:
                    at = _moved(builder, start, builder.mul(x_step, _I64(16 * row)))
                    _call(builder, "tileloadd64", _I8(_ROWS + row - first), at, x_step)
                for part in parts:
                    for row in rows:
                        _call(builder, "tdpbf16ps", _I8(_SUMS + row), _I8(_ROWS + row - first), _I8(_WEIGHTS + part))
        for row, at in enumerate(sums):
            _call(builder, "tilestored64", _I8(_SUMS + row), at, _I64(64))
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(high, terms, i64, i64, i64, i64, i64), code


@intrinsic(prefer_literal=True)
def multiply_and_finish(_, high, kind, x, x_step, across, weight, depth, sums, next_weight, num_fetched, before):
    """Compute `sums` `[high * 16, 32]`, and beside it `finish_rows` of the sums `before` these.

    The processor multiplies tiles and computes with vectors at the same time if it finds both among the next few
    hundred instructions. The next rows need the weights again, but not these rows of `x`: a hint tells the cache so.

    Args:
        high: number of tiles of rows, a constant of 1 or 2.
        kind: see `finish_rows`.
        x: rows of bfloat16.
        x_step: bytes from one row of a tile to the next.
        across: bytes from one tile of a row to the next.
        weight: `[depth, 2]` tiles.
        depth: number of tiles in a row of `x`.
        sums: where to write the sums.
        next_weight: weights to fetch into the cache meanwhile.
        num_fetched: number of their lines of 64 bytes to fetch beside each step of depth.
        before: the arguments of `finish_rows` after `kind`.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_step, across, weight, depth, sums, next_weight, num_fetched, before_them = arguments[2:]
        rows, *finished = cgutils.unpack_tuple(builder, before_them)
        finish = _finishing(context, builder, kind.literal_value, *finished)
        at_once = builder.sdiv(builder.add(rows, builder.sub(depth, _I64(1))), depth)
        tiles = [(row, column) for row in range(high.literal_value) for column in range(2)]
        for row, column in tiles:
            _call(builder, "tilezero", _I8(_SUMS + 2 * row + column))
        with cgutils.for_range(builder, depth, intp=_I64) as loop:
            weights = builder.add(weight, builder.mul(loop.index, _I64(2 * TILE_BYTES)))
            for column in range(2):
                at = _moved(builder, weights, _I64(TILE_BYTES * column))
                _call(builder, "tileloadd64", _I8(_WEIGHTS + column), at, _I64(64))
            with cgutils.for_range(builder, num_fetched, intp=_I64) as fetched:
                line = builder.add(builder.mul(loop.index, num_fetched), fetched.index)
                _fetch(builder, _moved(builder, next_weight, builder.mul(line, _I64(64))))
            along = builder.add(x, builder.mul(loop.index, across))
            for row, column in tiles:
                if column == 0:
                    at = _moved(builder, along, builder.mul(depth, _I64(TILE_BYTES * row)))
                    _call(builder, "tileloaddt164", _I8(_ROWS + row), at, x_step)
                into = _I8(_SUMS + 2 * row + column)
                _call(builder, "tdpbf16ps", into, _I8(_ROWS + row), _I8(_WEIGHTS + column))
            start = builder.mul(loop.index, at_once)
            stop = builder.add(start, at_once)
            stop = builder.select(builder.icmp_signed("<", stop, rows), stop, rows)
            with cgutils.for_range_slice(builder, start, stop, _I64(1), intp=_I64) as (row, _):
                finish(row)
        for row, column in tiles:
            at = _moved(builder, sums, _I64(2 * TILE_BYTES * row + 64 * column))
            _call(builder, "tilestored64", _I8(_SUMS + 2 * row + column), at, _I64(128))
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(high, kind, *[i64] * 8, before), code


def configuring(compiler: Compiler) -> Any:
    """The function that saves the configuration of the thread's tiles, and configures them for `few` rows of `x`."""

    @compiler.inline
    def configure(few, saved, own):
        wanted = carray(pointer(own), 64, np.uint8)
        wanted[:] = 0
        wanted[0] = 1
        for tile in range(8):
            wanted[16 + 2 * tile] = 64
            wanted[48 + tile] = 16 if tile >= 6 else few
        store_configuration(saved)
        load_configuration(own)

    return configure


def _fetch(builder: Any, address: Any) -> None:
    function_type = ir.FunctionType(_NOTHING, [_BYTES, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(fetch, [address, _I32(0), _I32(2), _I32(1)])


@intrinsic(prefer_literal=True)
def finish_rows(_, kind, rows, sums, bias, residual, out, out_step, wide):
    """Write `rows` rows of `sums` `[rows, 32]` as bfloat16; all are addresses.

    16 rows of `out` have `16 * wide` numbers; each of them starts `out_step` numbers after the one before.

    `kind` is a constant, the sum of what to do to a row: `BIAS` adds 32 numbers, `RESIDUAL` adds a row that lies as
    that of `out` does, and `GATE` writes 16 numbers: silu of the first 16, times the last 16.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        finish = _finishing(context, builder, kind.literal_value, *arguments[2:])
        with cgutils.for_range(builder, arguments[1], intp=_I64) as loop:
            finish(loop.index)
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(kind, i64, i64, i64, i64, i64, i64, i64), code


def _finishing(
    context: Any, builder: Any, kind: int, sums: Any, bias: Any, residual: Any, out: Any, out_step: Any, wide: Any
) -> Callable[[Any], None]:
    """The function that adds code to finish a row; see `finish_rows`."""
    make, stored = VectorCode(context, builder, 16), ir.IntType(16)

    def at(address: Any, kind: Any) -> Any:
        return builder.inttoptr(address, kind.as_pointer())

    added = [make.load(at(bias, stored), v) for v in range(2)] if kind & BIAS else []

    def finish(row: Any) -> None:
        tile, inside = builder.lshr(row, _I64(4)), builder.and_(row, _I64(15))
        offset = builder.add(
            builder.mul(tile, builder.mul(wide, _I64(32))), builder.mul(inside, builder.shl(out_step, _I64(1)))
        )
        start = at(builder.add(sums, builder.mul(row, _I64(128))), _FLOAT)
        values = [make.load(start, v) for v in range(2)]
        if added:
            values = [builder.fadd(value, one) for value, one in zip(values, added, strict=True)]
        if kind & RESIDUAL:
            other = at(builder.add(residual, offset), stored)
            values = [builder.fadd(value, make.load(other, v)) for v, value in enumerate(values)]
        if kind & GATE:
            gate, up = values
            one = ir.Constant(gate.type, [1.0] * 16)
            below = builder.fadd(one, exponential(builder, builder.fneg(gate)))
            values = [builder.fmul(builder.fdiv(gate, below), up)]
        target = at(builder.add(out, offset), stored)
        for v, value in enumerate(values):
            narrow = _narrow(builder, value)
            place = builder.gep(target, [_I64(16 * v)])
            builder.store(narrow, builder.bitcast(place, narrow.type.as_pointer()), align=2)

    return finish


def _narrow(builder: Any, numbers: Any) -> Any:
    return builder.fptrunc(numbers, ir.VectorType(_BFloat16(), 16))


def to_bfloat16(builder: Any, numbers: Any) -> Any:
    """Round a vector of 16 float32; returns the bits as 16 integers of 16 bits."""
    return builder.bitcast(_narrow(builder, numbers), ir.VectorType(ir.IntType(16), 16))


def exponential(builder: Any, x: Any) -> Any:
    """e ** x of a vector; NaN stays NaN."""

    def constant(number: float) -> Any:
        return ir.Constant(x.type, [number] * x.type.count)

    t = builder.fmul(x, constant(LOG2_E))
    for limit, beyond in ((-126.0, "<"), (128.0, ">")):
        t = builder.select(builder.fcmp_ordered(beyond, t, constant(limit)), constant(limit), t)
    round_down = ir.FunctionType(x.type, [x.type])
    floor = cgutils.get_or_insert_function(builder.module, round_down, f"llvm.floor.v{x.type.count}f32")
    whole = builder.call(floor, [builder.fadd(t, constant(0.5))])
    f = builder.fsub(t, whole)
    power = constant(EXPONENTIAL[-1])
    for factor in reversed(EXPONENTIAL[:-1]):
        power = builder.fadd(builder.fmul(power, f, flags=FUSED), constant(factor), flags=FUSED)
    indices = ir.VectorType(_I32, x.type.count)
    exponent = builder.add(builder.fptosi(whole, indices), ir.Constant(indices, [127] * x.type.count))
    scale = builder.shl(exponent, ir.Constant(indices, [23] * x.type.count))
    return builder.fmul(power, builder.bitcast(scale, x.type))
