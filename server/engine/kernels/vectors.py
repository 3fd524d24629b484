"""Vector instructions that numba does not emit, written in LLVM's processor-independent instructions.

A compiler vectorises a plain loop only if it can prove enough about it; otherwise sums stay in memory. The two inner
loops of attention are too important for that, so this module writes them explicitly: sums stay in registers, and the
numbers of a vector are added in a tree instead of one by one. LLVM splits vectors that are wider than the processor's,
and uses fused multiply-add where available.

Arrays are flat; a matrix in them is given by an offset and the distance between rows. Stored numbers are float32, or
bfloat16 as uint16, and are widened when loaded. The functions allocate nothing and read only the given rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDEST = 16
"""Maximum number of float32 in a vector: one register of AVX-512, two of AVX2, four of NEON."""

SUMS = 24 if get_host_cpu_features().get("avx512f") else 6
"""Number of sum vectors that fit into registers beside the factors."""

_FLOAT, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
FUSED = ("contract",)


def lanes(width: int) -> int:
    """The vector length that divides rows of `width` numbers without a remainder."""
    return math.gcd(width, WIDEST)


class VectorCode:
    """Code that loops share, for vectors of one length."""

    def __init__(self, context: Any, builder: Any, width: int) -> None:
        self._context, self.builder = context, builder
        self.lanes = lanes(width)
        self.per_row = width // self.lanes
        self._floats = ir.VectorType(_FLOAT, self.lanes)
        self._indices = ir.VectorType(_I32, self.lanes)
        self._anything = ir.Constant(self._floats, ir.Undefined)

    def pointer_to(self, array_type: Any, array: Any, offset: Any, row: Any, step: Any) -> Any:
        """The address of a row of an array."""
        start = self._context.make_array(array_type)(self._context, self.builder, array).data
        return self.builder.gep(start, [self.builder.add(offset, self.builder.mul(row, step))])

    def load(self, row: Any, vector: int = 0) -> Any:
        """Load a vector of a row, as float32."""
        pointer = self.builder.gep(row, [_I64(vector * self.lanes)])
        if pointer.type.pointee == _FLOAT:
            return self.builder.load(self.builder.bitcast(pointer, self._floats.as_pointer()), align=4)
        halves = ir.VectorType(_I16, self.lanes)
        stored = self.builder.load(self.builder.bitcast(pointer, halves.as_pointer()), align=2)
        upper = self.builder.shl(self.builder.zext(stored, self._indices), self._indices([16] * self.lanes))
        return self.builder.bitcast(upper, self._floats)

    def store(self, value: Any, row: Any, vector: int = 0) -> None:
        """Store a vector of float32 in a row."""
        pointer = self.builder.gep(row, [_I64(vector * self.lanes)])
        self.builder.store(value, self.builder.bitcast(pointer, self._floats.as_pointer()), align=4)

    def spread(self, number: Any) -> Any:
        """A vector with the number in every lane."""
        one = self.builder.insert_element(self._anything, number, _I32(0))
        return self.pick(one, self._anything, [0] * self.lanes)

    def pick(self, x: Any, y: Any, places: Sequence[int]) -> Any:
        """A vector of lanes of two vectors; lanes of the second are numbered after those of the first."""
        return self.builder.shuffle_vector(x, y, self._indices(list(places)))

    def multiply_add(self, total: Any, x: Any, y: Any) -> Any:
        """`total + x * y`."""
        return self.builder.fadd(total, self.builder.fmul(x, y, flags=FUSED), flags=FUSED)


@intrinsic
def fetch_add(_: Any, array: Any) -> Any:
    """Atomically increment the first number of an int64 array; returns the old value."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer_to = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", pointer_to, _I64(1), "monotonic")

    return types.int64(array), code


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    """An address as a pointer for `numba.carray`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _BYTES)

    return types.voidptr(types.int64), code


@intrinsic(prefer_literal=True)
def stack_memory(_: Any, size: Any) -> Any:
    """The address of `size` bytes, a constant, that last until the calling loop returns; aligned to 64 bytes.

    numba frees an array after its last use, even if its address is still in use.
    """
    num_bytes = size.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():  # numba's `alloca_once` would write a zero to every byte, one by one
            memory = builder.alloca(ir.ArrayType(ir.IntType(8), num_bytes))
        memory.align = 64
        return builder.ptrtoint(memory, _I64)

    return types.int64(size), code


@intrinsic(prefer_literal=True)
def add_products(_, rows, width, a, a0, a_step, b, b0, b_step, c, c0, n, ahead):
    """Matrix product: `c[r, :] += sum of a[r, i] * b[i, :]` for `i` below `n`; rows of `c` are contiguous.

    Fetches as many rows of `b` from the offset `ahead` on, unless it is None: one beside each row that is read, because
    the processor waits for many that it fetches at a time.

    `rows` and `width` are constants, which determine how many sums are in registers at a time. Each row is summed in
    the order of `i`, independent of the other rows.
    """
    num_rows, num_columns = rows.literal_value, width.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, a, a0, a_step, b, b0, b_step, c, c0, n, offset = arguments
        make = VectorCode(context, builder, num_columns)
        fetch_row = _fetching(make, signature.args[5], b, None if ahead == types.none else offset, b_step)

        def add_tile(first: Any, high: int, vectors: range) -> None:
            """Add the products of `high` rows, from the first on."""
            tile = [builder.add(first, _I64(r)) for r in range(high)]
            a_rows = [make.pointer_to(signature.args[2], a, a0, row, a_step) for row in tile]
            c_rows = [make.pointer_to(signature.args[8], c, c0, row, _I64(num_columns)) for row in tile]
            sums = {}
            for r, row in enumerate(c_rows):
                for v in vectors:
                    sums[r, v] = cgutils.alloca_once_value(builder, make.load(row, v))
            with cgutils.for_range(builder, n, intp=_I64) as loop:
                b_row = make.pointer_to(signature.args[5], b, b0, loop.index, b_step)
                fetch_row(loop.index)
                factors = {v: make.load(b_row, v) for v in vectors}
                for r, row in enumerate(a_rows):
                    number = make.spread(builder.load(builder.gep(row, [loop.index])))
                    for v in vectors:
                        total = make.multiply_add(builder.load(sums[r, v]), number, factors[v])
                        builder.store(total, sums[r, v])
            for (r, v), total in sums.items():
                make.store(builder.load(total), c_rows[r], v)

        wide = min(make.per_row, SUMS)
        high = SUMS // wide
        for v in range(0, make.per_row, wide):
            vectors = range(v, min(make.per_row, v + wide))
            whole = num_rows // high * high
            with cgutils.for_range_slice(builder, _I64(0), _I64(whole), _I64(high), intp=_I64) as (first, _):
                add_tile(first, high, vectors)
            if whole < num_rows:
                add_tile(_I64(whole), num_rows - whole, vectors)
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(rows, width, a, i64, i64, b, i64, i64, c, i64, i64, ahead), code


@intrinsic(prefer_literal=True)
def dot_products(_, rows, width, q, q0, k, k0, k_step, out, out0, out_step, ahead):
    """`out[r, p] = q[r, :] . k[p, :]` for one vector's length of positions `p`; rows of `q` are contiguous.

    `rows` and `width` are constants. Rows of `k` are read once, in order. Fetches as many from the offset `ahead` on,
    unless it is None, as `add_products` does.
    """
    num_rows, num_columns = rows.literal_value, width.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, q, q0, k, k0, k_step, out, out0, out_step, offset = arguments
        make = VectorCode(context, builder, num_columns)
        fetch_row = _fetching(make, signature.args[4], k, None if ahead == types.none else offset, k_step)
        q_rows = [make.pointer_to(signature.args[2], q, q0, _I64(r), _I64(num_columns)) for r in range(num_rows)]
        queries = [[make.load(row, v) for v in range(make.per_row)] for row in q_rows]

        def of(positions: range) -> list[Any]:
            """A vector for each row, in which neighbouring lanes contain the partial sums of one position."""
            if len(positions) == 1:
                key = make.pointer_to(signature.args[4], k, k0, _I64(positions[0]), k_step)
                fetch_row(_I64(positions[0]))
                factors = [make.load(key, v) for v in range(make.per_row)]
                return [_dot(make, query, factors) for query in queries]
            half = len(positions) // 2
            pairs = zip(of(positions[:half]), of(positions[half:]), strict=True)
            return [_halve(make, x, y, len(positions)) for x, y in pairs]

        for r, total in enumerate(of(range(make.lanes))):
            make.store(total, make.pointer_to(signature.args[7], out, out0, _I64(r), out_step))
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(rows, width, q, i64, k, i64, i64, out, i64, i64, ahead), code


def _fetching(make: VectorCode, array_type: Any, array: Any, offset: Any, step: Any) -> Callable[[Any], None]:
    """The function that adds code to fetch a row into the second-level cache, if there is an offset."""
    builder = make.builder

    def fetch_row(row: Any) -> None:
        if offset is None:
            return
        start = make.pointer_to(array_type, array, offset, row, step)
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        num_bytes = make.per_row * make.lanes * (2 if start.type.pointee == _I16 else 4)
        for line in range(0, num_bytes, 64):
            address = builder.gep(builder.bitcast(start, _BYTES), [_I64(line)])
            builder.call(fetch, [address, _I32(0), _I32(2), _I32(1)])

    return fetch_row


def _dot(make: VectorCode, xs: Sequence[Any], ys: Sequence[Any]) -> Any:
    """A vector whose lanes add up to a dot product."""
    total = make.builder.fmul(xs[0], ys[0], flags=FUSED)
    for x, y in zip(xs[1:], ys[1:], strict=True):
        total = make.multiply_add(total, x, y)
    return total


def _halve(make: VectorCode, x: Any, y: Any, positions: int) -> Any:
    """Combine two vectors of partial sums into one, in which each position has half as many lanes."""
    parts = make.lanes // positions  # lanes per position in the result; x and y have twice as many
    first = [2 * parts * (lane // parts) + lane % parts for lane in range(make.lanes)]
    second = [pointer_to + parts for pointer_to in first]
    return make.builder.fadd(make.pick(x, y, first), make.pick(x, y, second), flags=FUSED)


@intrinsic(prefer_literal=True)
def largest(_: Any, at_once: Any, x: Any, x0: Any, n: Any) -> Any:
    """The largest of `n` numbers (a multiple of the constant `at_once`), ignoring NaN."""
    width = at_once.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x, x0, n = arguments
        make = VectorCode(context, builder, width)
        lowest = ir.Constant(_FLOAT, float("-inf"))
        found = cgutils.alloca_once_value(builder, make.spread(lowest))
        start = make.pointer_to(signature.args[1], x, x0, _I64(0), _I64(0))
        with cgutils.for_range_slice(builder, _I64(0), n, _I64(make.lanes), intp=_I64) as (pointer_to, _):
            _keep_larger(builder, found, make.load(builder.gep(start, [pointer_to])))
        half = make.lanes // 2
        while half:
            best = builder.load(found)
            _keep_larger(builder, found, make.pick(best, best, [(i + half) % make.lanes for i in range(make.lanes)]))
            half //= 2
        return builder.extract_element(builder.load(found), _I32(0))

    return types.float32(at_once, x, types.int64, types.int64), code


def _keep_larger(builder: Any, found: Any, candidate: Any) -> None:
    best = builder.load(found)
    builder.store(builder.select(builder.fcmp_ordered(">", candidate, best), candidate, best), found)
