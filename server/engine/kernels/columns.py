"""The softmax of attention in columns: a vector holds one number of each of 16 query rows, so no lane needs another.

Scores come from tiles as `[positions, 16]`. The running maximum and sum follow FlashAttention (Dao et al. 2022). All
arguments are addresses, except where stated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.engine.kernels.tiles import exponential, to_bfloat16
from server.engine.kernels.units import BLOCK
from server.engine.kernels.vectors import FUSED

LANES = 16
_CHAINS = 4
"""Maxima that are kept at a time, because each waits for the one before it."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS, _INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_I32, LANES)
_LINE = 64  # bytes of a vector


def _at(builder: Any, address: Any, kind: Any, offset: Any = 0) -> Any:
    moved = builder.add(address, offset if isinstance(offset, ir.Value) else _I64(offset))
    return builder.inttoptr(moved, kind.as_pointer())


def _load(builder: Any, address: Any, offset: Any = 0, kind: Any = _FLOATS) -> Any:
    return builder.load(_at(builder, address, kind, offset), align=4)


def _store(builder: Any, value: Any, address: Any, offset: Any = 0) -> None:
    builder.store(value, _at(builder, address, value.type, offset), align=4)


def _spread(builder: Any, number: Any) -> Any:
    kind = ir.VectorType(number.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTEGERS, [0] * LANES))


def _larger(builder: Any, x: Any, y: Any) -> Any:
    """The larger of two vectors; NaN in `y` is ignored."""
    return builder.select(builder.fcmp_ordered(">", y, x), y, x)


def _visible(builder: Any, own: Any, before: Any) -> Callable[[Any], Any]:
    """The function that says which lanes see a position of the block: those after `before`, up to `own`."""

    def visible(position: Any) -> Any:
        here = _spread(builder, builder.trunc(position, _I32))
        return builder.and_(builder.icmp_signed("<=", here, own), builder.icmp_signed(">", here, before))

    return visible


@intrinsic
def weigh_columns(_, scores, own, before, scaling, highest, totals, scales, upper, lower):
    """Turn a block's scores `[BLOCK, 16]` into weights, zero for positions that are not visible.

    Args:
        scores: the block's scores, before scaling; overwritten.
        own: int32 `[16]`, the last position of the block that each lane sees.
        before: int32 `[16]`, the position before the first that it sees.
        scaling: a float32, not an address.
        highest: `[16]`, the running maximum, which is updated.
        totals: `[16]`, the running sum of weights, which is updated.
        scales: `[16]`, receives the factor for the sums of earlier blocks.
        upper: receives the weights as tiles of weights, `[BLOCK / 2, 16, 2]` numbers of bfloat16.
        lower: receives what `upper` lacks, in the same layout.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, own, before, scaling, highest, totals, scales, upper, lower = arguments
        visible = _visible(builder, _load(builder, own, kind=_INTEGERS), _load(builder, before, kind=_INTEGERS))
        factor, nothing = _spread(builder, scaling), ir.Constant(_FLOATS, [0.0] * LANES)
        lowest = ir.Constant(_FLOATS, [float("-inf")] * LANES)
        earlier = _load(builder, highest)
        found = [cgutils.alloca_once_value(builder, lowest) for _ in range(_CHAINS)]
        with cgutils.for_range_slice(builder, _I64(0), _I64(BLOCK), _I64(_CHAINS), intp=_I64) as (start, _):
            for chain, best in enumerate(found):
                position = builder.add(start, _I64(chain))
                offset = builder.mul(position, _I64(_LINE))
                score = builder.fmul(_load(builder, scores, offset), factor)
                score = builder.select(visible(position), score, lowest)
                _store(builder, score, scores, offset)
                builder.store(_larger(builder, builder.load(best), score), best)
        largest = earlier
        for best in found:
            largest = _larger(builder, largest, builder.load(best))
        one = ir.Constant(_FLOATS, [1.0] * LANES)
        grown = builder.fcmp_ordered(">", largest, earlier)
        scale = builder.select(grown, exponential(builder, builder.fsub(earlier, largest)), one)
        added = [cgutils.alloca_once_value(builder, nothing) for _ in range(2)]
        with cgutils.for_range(builder, _I64(BLOCK // 2), intp=_I64) as loop:
            pairs = []
            for half, total in enumerate(added):
                position = builder.add(builder.mul(loop.index, _I64(2)), _I64(half))
                score = _load(builder, scores, builder.mul(position, _I64(_LINE)))
                weight = exponential(builder, builder.fsub(score, largest))
                weight = builder.select(visible(position), weight, nothing)
                builder.store(builder.fadd(builder.load(total), weight), total)
                pairs.append(_halves(builder, weight))
            for target, (first, second) in zip((upper, lower), zip(*pairs, strict=True), strict=True):
                pair = builder.or_(first, builder.shl(second, ir.Constant(_INTEGERS, [16] * LANES)))
                _store(builder, pair, target, builder.mul(loop.index, _I64(_LINE)))
        total = builder.fmul(_load(builder, totals), scale)
        for part in added:
            total = builder.fadd(total, builder.load(part))
        for value, target in ((largest, highest), (scale, scales), (total, totals)):
            _store(builder, value, target)
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(i64, i64, i64, types.float32, i64, i64, i64, i64, i64), code


def _halves(builder: Any, weight: Any) -> tuple[Any, Any]:
    """Two numbers of bfloat16 whose sum is nearly the weight, each as the lower half of an integer."""
    upper = to_bfloat16(builder, weight)
    back = builder.bitcast(builder.shl(upper, ir.Constant(_INTEGERS, [16] * LANES)), _FLOATS)
    return upper, to_bfloat16(builder, builder.fsub(weight, back))


@intrinsic
def add_columns(_, sums, scales, upper, lower, n):
    """`sums` `[n, 16]` times `scales` `[16]`, plus `upper` and `lower`, which are shaped as `sums`; `n` is a number."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, scales, upper, lower, n = arguments
        scale = _load(builder, scales)
        with cgutils.for_range(builder, n, intp=_I64) as loop:
            offset = builder.mul(loop.index, _I64(_LINE))
            added = builder.fadd(_load(builder, upper, offset), _load(builder, lower, offset))
            scaled = builder.fmul(_load(builder, sums, offset), scale, flags=FUSED)
            _store(builder, builder.fadd(scaled, added, flags=FUSED), sums, offset)
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
                numbers = builder.trunc(to_bfloat16(builder, row), ir.VectorType(ir.IntType(16), LANES))
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
