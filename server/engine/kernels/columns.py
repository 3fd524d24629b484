"""The softmax of attention in columns: a vector holds one number of each of 16 query rows, so no lane needs another.

Scores come from tiles as `[positions, 16]`. The running maximum and sum follow FlashAttention (Dao et al. 2022). All
arguments are addresses, except where stated.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.engine.kernels.tiles import EXPONENTIAL, LOG2_E, to_bfloat16
from server.engine.kernels.units import BLOCK
from server.engine.kernels.vectors import FUSED

LANES = 16
_CHAINS = 4
"""Maxima that are kept at a time, because each waits for the one before it."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS, _INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_LINE = 64  # bytes of a vector
_SIXTEEN, _UPPER, _ROUNDING = (ir.Constant(_INTEGERS, [number] * LANES) for number in (16, 0xFFFF0000, 0x8000))


def _at(builder: Any, address: Any, kind: Any, offset: Any = 0) -> Any:
    moved = builder.add(address, offset if isinstance(offset, ir.Value) else _I64(offset))
    return builder.inttoptr(moved, kind.as_pointer())


def _load(builder: Any, address: Any, offset: Any = 0, kind: Any = _FLOATS) -> Any:
    return builder.load(_at(builder, address, kind, offset), align=2)


def _store(builder: Any, value: Any, address: Any, offset: Any = 0) -> None:
    builder.store(value, _at(builder, address, value.type, offset), align=4)


def _spread(builder: Any, number: Any) -> Any:
    kind = ir.VectorType(number.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTEGERS, [0] * LANES))


def _larger(builder: Any, x: Any, y: Any) -> Any:
    """The larger of two vectors; NaN in `y` is ignored."""
    return builder.select(builder.fcmp_ordered(">", y, x), y, x)


@intrinsic
def mask_columns(_, scores, scaling, own, before):
    """Multiply a block's scores by `scaling`; minus infinity where a lane does not see a position of the block.

    Args:
        scores: `[BLOCK, 16]`.
        scaling: a float32, not an address.
        own: int32 `[16]`, the last position of the block that each lane sees.
        before: int32 `[16]`, the position before the first that it sees.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, scaling, own, before = arguments
        factor = _spread(builder, scaling)
        last, first = _load(builder, own, kind=_INTEGERS), _load(builder, before, kind=_INTEGERS)
        lowest = ir.Constant(_FLOATS, [float("-inf")] * LANES)
        with cgutils.for_range(builder, _I64(BLOCK), intp=_I64) as loop:
            here = _spread(builder, builder.trunc(loop.index, _I32))
            seen = builder.and_(builder.icmp_signed("<=", here, last), builder.icmp_signed(">", here, first))
            offset = builder.mul(loop.index, _I64(_LINE))
            score = builder.fmul(_load(builder, scores, offset), factor)
            _store(builder, builder.select(seen, score, lowest), scores, offset)
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(i64, types.float32, i64, i64), code


@intrinsic
def weigh_columns(_, scores, scaling, highest, totals, scales, weights):
    """Turn a block's scores `[BLOCK, 16]` into weights.

    Args:
        scores: the block's scores, before scaling.
        scaling: a float32, not an address.
        highest: `[16]`, the running maximum of scaled scores, which is updated.
        totals: `[16]`, the running sum of weights, which is updated.
        scales: `[16]`, receives the factor for the sums of earlier blocks.
        weights: receives the weights as tiles of weights: `[2, BLOCK / 2, 16, 2]` numbers of bfloat16, first their
            upper halves and then the rest.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, scaling, highest, totals, scales, weights = arguments
        earlier = _load(builder, highest)
        factor = _spread(builder, scaling)
        largest = _highest(builder, scores, factor, earlier)
        grown = builder.fcmp_ordered(">", largest, earlier)
        lowest, nothing, one = (ir.Constant(_FLOATS, [number] * LANES) for number in (float("-inf"), 0.0, 1.0))
        # A lane that has seen no position yet has no maximum to subtract.
        subtracted = builder.select(builder.fcmp_ordered("==", largest, lowest), nothing, largest)
        to_powers = ir.Constant(_FLOATS, [LOG2_E] * LANES)
        subtracted = builder.fmul(subtracted, to_powers)

        def weigh(score: Any) -> Any:
            return _power(builder, builder.fsub(builder.fmul(score, to_powers, flags=FUSED), subtracted, flags=FUSED))

        added = [cgutils.alloca_once_value(builder, nothing) for _ in range(2)]
        with cgutils.for_range(builder, _I64(BLOCK // 2), intp=_I64) as loop:
            pairs = []
            for half, total in enumerate(added):
                position = builder.add(builder.mul(loop.index, _I64(2)), _I64(half))
                score = _load(builder, scores, builder.mul(position, _I64(_LINE)))
                weight = weigh(builder.fmul(score, factor))
                builder.store(builder.fadd(builder.load(total), weight), total)
                pairs.append(_halves(builder, weight))
            for start, (first, second) in zip((0, BLOCK // 2 * _LINE), zip(*pairs, strict=True), strict=True):
                pair = builder.or_(builder.lshr(first, _SIXTEEN), builder.and_(second, _UPPER))
                _store(builder, pair, weights, builder.add(builder.mul(loop.index, _I64(_LINE)), _I64(start)))
        scale = builder.select(grown, weigh(earlier), one)
        total = builder.fmul(_load(builder, totals), scale)
        for part in added:
            total = builder.fadd(total, builder.load(part))
        for value, target in ((largest, highest), (scale, scales), (total, totals)):
            _store(builder, value, target)
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(i64, types.float32, i64, i64, i64, i64), code


def _highest(builder: Any, scores: Any, scaling: Any, earlier: Any) -> Any:
    """The larger of `earlier` and the highest scaled score of each lane; NaN is ignored."""
    found = [cgutils.alloca_once_value(builder, earlier) for _ in range(_CHAINS)]
    with cgutils.for_range_slice(builder, _I64(0), _I64(BLOCK), _I64(_CHAINS), intp=_I64) as (start, _):
        for chain, best in enumerate(found):
            score = _load(builder, scores, builder.mul(builder.add(start, _I64(chain)), _I64(_LINE)))
            builder.store(_larger(builder, builder.load(best), builder.fmul(score, scaling)), best)
    largest = earlier
    for best in found:
        largest = _larger(builder, largest, builder.load(best))
    return largest


def _power(builder: Any, t: Any) -> Any:
    """2 ** t of numbers up to 1, accurate to 18 bits, more than weights keep; below 2 ** -125 zero; NaN stays NaN.

    An instruction whose result is too small to be a normal number takes some hundred cycles.
    """
    seen = builder.fcmp_unordered(">=", t, ir.Constant(_FLOATS, [-125.0] * LANES))
    whole = builder.call(_vector_function(builder, "llvm.rint.v16f32", 1), [t])
    f = builder.fsub(t, whole)
    power = ir.Constant(_FLOATS, [EXPONENTIAL[5]] * LANES)
    for number in reversed(EXPONENTIAL[:5]):
        power = builder.fadd(builder.fmul(power, f, flags=FUSED), ir.Constant(_FLOATS, [number] * LANES), flags=FUSED)
    lanes = builder.bitcast(seen, ir.IntType(LANES))
    scale = _vector_function(builder, "llvm.x86.avx512.mask.scalef.ps.512", 3, lanes.type, _I32)
    nothing = ir.Constant(_FLOATS, [0.0] * LANES)
    return builder.call(scale, [power, whole, nothing, lanes, _I32(4)])  # 4: round as configured


def _vector_function(builder: Any, name: str, vectors: int, *more: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [*[_FLOATS] * vectors, *more])
    return cgutils.get_or_insert_function(builder.module, kind, name)


def _halves(builder: Any, weight: Any) -> tuple[Any, Any]:
    """Two numbers of bfloat16 whose sum is nearly the weight, each as the upper half of an integer."""
    upper = builder.add(builder.bitcast(weight, _INTEGERS), _ROUNDING)  # round to nearest; a NaN's rest is NaN again
    rest = builder.fsub(weight, builder.bitcast(builder.and_(upper, _UPPER), _FLOATS))
    return upper, builder.add(builder.bitcast(rest, _INTEGERS), _ROUNDING)


@intrinsic
def add_columns(_, sums, scales, added, n):
    """`sums` `[n, 16]` times `scales` `[16]`, plus `added`, which is shaped as `sums`; `n` is a number."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, scales, added, n = arguments
        scale = _load(builder, scales)
        with cgutils.for_range(builder, n, intp=_I64) as loop:
            offset = builder.mul(loop.index, _I64(_LINE))
            scaled = builder.fmul(_load(builder, sums, offset), scale, flags=FUSED)
            _store(builder, builder.fadd(scaled, _load(builder, added, offset), flags=FUSED), sums, offset)
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(i64, i64, i64, i64), code


@intrinsic
def turn_rows(_, rows, out, n):
    """Write 16 rows of `n` pairs of bfloat16 to `out` `[n, 16]`, also of pairs; `n` is a multiple of 16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, out, n = arguments
        with cgutils.for_range_slice(builder, _I64(0), n, _I64(LANES), intp=_I64) as (start, _):
            loaded = []
            for i in range(LANES):
                offset = builder.mul(builder.add(builder.mul(n, _I64(i)), start), _I64(4))
                loaded.append(_load(builder, rows, offset, _INTEGERS))
            for i, turned in enumerate(_transposed(builder, loaded)):
                _store(builder, turned, out, builder.mul(builder.add(start, _I64(i)), _I64(_LINE)))
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(i64, i64, i64), code


@intrinsic
def turn_values(_, values, row_bytes, filled, out, n):
    """Write `filled` rows of `n` bfloat16 to `out` `[n, BLOCK]`, and zeros for further rows; `n` is a multiple of 16.

    Rows start `row_bytes` apart; there is at least one.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, row_bytes, filled, out, n = arguments
        nothing, last = ir.Constant(_INTEGERS, [0] * LANES), builder.sub(filled, _I64(1))

        def load(position: Any, column: Any) -> Any:
            """16 numbers of a row, as the lower halves of integers."""
            there = builder.icmp_signed("<", position, filled)
            offset = builder.mul(builder.select(there, position, last), row_bytes)
            halves = _load(builder, values, builder.add(offset, builder.mul(column, _I64(2))), _HALVES)
            return builder.select(there, builder.zext(halves, _INTEGERS), nothing)

        with (
            cgutils.for_range_slice(builder, _I64(0), _I64(BLOCK), _I64(2 * LANES), intp=_I64) as (start, _),
            cgutils.for_range_slice(builder, _I64(0), n, _I64(LANES), intp=_I64) as (column, _),
        ):
            pairs = []
            for i in range(0, 2 * LANES, 2):
                first, second = (load(builder.add(start, _I64(i + half)), column) for half in range(2))
                pairs.append(builder.or_(first, builder.shl(second, _SIXTEEN)))
            for i, turned in enumerate(_transposed(builder, pairs)):
                row = builder.mul(builder.add(column, _I64(i)), _I64(2 * BLOCK))
                _store(builder, turned, out, builder.add(row, builder.mul(start, _I64(2))))
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(i64, i64, i64, i64, i64), code


@intrinsic
def turn_columns(_, sums, totals, out, n):
    """Write `sums` `[n, 16]`, divided by `totals` `[16]`, to `out` `[16, n]` as bfloat16; `n` is a multiple of 16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, totals, out, n = arguments
        share = builder.fdiv(ir.Constant(_FLOATS, [1.0] * LANES), _load(builder, totals))
        row_bytes = builder.mul(n, _I64(2))
        with cgutils.for_range_slice(builder, _I64(0), n, _I64(LANES), intp=_I64) as (start, _):
            rows = []
            for i in range(LANES):
                offset = builder.mul(builder.add(start, _I64(i)), _I64(_LINE))
                rows.append(builder.fmul(_load(builder, sums, offset), share))
            for lane, row in enumerate(_transposed(builder, rows)):
                numbers = to_bfloat16(builder, row)
                offset = builder.add(builder.mul(row_bytes, _I64(lane)), builder.mul(start, _I64(2)))
                builder.store(numbers, _at(builder, out, numbers.type, offset), align=2)
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(i64, i64, i64, i64), code


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of 16 vectors: in each of four rounds, pairs of vectors exchange halves, quarters and so on."""
    distance = LANES // 2
    while distance:
        for i in range(LANES):
            if i & distance:
                continue
            x, y = rows[i], rows[i + distance]
            first = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
            second = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
            rows[i] = builder.shuffle_vector(x, y, ir.Constant(_INTEGERS, first))
            rows[i + distance] = builder.shuffle_vector(x, y, ir.Constant(_INTEGERS, second))
        distance //= 2
    return rows
