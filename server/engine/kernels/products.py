"""Products of rows of bfloat16 and frozen weights, by AMX; a row's result depends on no other row.

A unit of work is 32 columns of the weights and at most `CHUNK` rows: its weights are read from memory once, and stay in
the cache from one block of rows to the next. The results of 32 rows are finished and written while the processor's
tiles multiply the next 32.
"""

from __future__ import annotations

import functools

from numba import carray

from server.engine.kernels.compiler import Compiler
from server.engine.kernels.shares import number_of_thread, taking
from server.engine.kernels.threads import Loop
from server.engine.kernels.tiles import TILE_BYTES, configuring, finish_rows, load_configuration, multiply_and_finish
from server.engine.kernels.units import CHUNK, COLUMNS, GATE, SHARES, TILE_COLUMNS, TILE_ROWS, ProductArguments
from server.engine.kernels.vectors import stack_memory

AT = ProductArguments(*range(2, 2 + len(ProductArguments._fields)))
"""Index of each argument."""
COUNTERS = 2 + len(AT)
"""Index of the first of `SHARES` counters, which start as 0."""

SUMS = 32 * COLUMNS * 4
"""Bytes of the sums of 32 rows in float32."""


@functools.cache
def product_loop(kind: int, *, keep: bool) -> Loop:
    """Compile a product, or load it from numba's cache; `finish_rows` says what its `kind` does to the results."""
    width = COLUMNS // 2 if kind & GATE else COLUMNS  # numbers that a unit writes of each row
    compiler = Compiler(kind, keep=keep)
    configure, take = configuring(compiler), taking(compiler)

    @compiler.loop
    def product(arguments):
        a = carray(arguments, COUNTERS + SHARES)
        rows, depth, blocks = a[AT.rows], a[AT.depth], a[AT.columns] // COLUMNS
        few, step, tiles, wide = max(1, min(rows, 16)), 2 * depth, depth // TILE_COLUMNS, blocks * width
        x_step, across = (2 * TILE_COLUMNS, TILE_BYTES) if a[AT.x_in_tiles] else (step, 2 * TILE_COLUMNS)
        out_step = TILE_COLUMNS if a[AT.out_in_tiles] else wide
        saved, own = stack_memory(64), stack_memory(64)
        sums, done = stack_memory(SUMS), stack_memory(SUMS)  # those of the rows before are finished beside others
        many, bias, place = 0, a[AT.bias], 0  # number of these rows, and where their bias and results are
        chunks, thread, finished = (rows + CHUNK - 1) // CHUNK, number_of_thread(a[AT.thread]), 0
        configure(few, saved, own)
        while True:
            unit, finished = take(a[COUNTERS:], a[1], a[AT.shares], thread, finished)
            if unit < 0:
                break
            block, chunk = unit // chunks, unit % chunks
            weight = a[AT.weight] + block * tiles * 2 * TILE_BYTES
            start, end = chunk * CHUNK, min(rows, (chunk + 1) * CHUNK)
            row, following = start, weight + tiles * 2 * TILE_BYTES
            column = block * width
            if a[AT.out_in_tiles]:
                column = column // TILE_COLUMNS * TILE_ROWS * TILE_COLUMNS + column % TILE_COLUMNS
            fetched = 0 if chunk < chunks - 1 else 32 if end - row <= 32 else 16
            while row < end:
                before = many, done, bias, a[AT.residual] + place, a[AT.out] + place, out_step, wide
                if end - row >= 32:
                    x, now = a[AT.x] + row * step, 32
                    multiply_and_finish(2, kind, x, x_step, across, weight, tiles, sums, following, fetched, before)
                else:
                    row, now = max(0, min(row, rows - 16)), few  # tiles have equally many rows: the last may overlap
                    x = a[AT.x] + row * step
                    multiply_and_finish(1, kind, x, x_step, across, weight, tiles, sums, following, fetched, before)
                sums, done, many = done, sums, now
                bias, place = a[AT.bias] + 2 * block * COLUMNS, 2 * (row * wide + column)
                row += now
                following += tiles * TILE_BYTES
                if row - start >= 64:
                    fetched = 0
        finish_rows(kind, many, done, bias, a[AT.residual] + place, a[AT.out] + place, out_step, wide)
        load_configuration(saved)

    return product
