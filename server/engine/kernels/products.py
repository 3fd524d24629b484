"""Products of rows of bfloat16 and frozen weights, by AMX; a row's result depends on no other row.

A unit of work is 32 columns of the weights and at most `CHUNK` rows: its weights are read from memory once, and stay in
the cache from one block of rows to the next.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from numba import carray

from server.engine.kernels.compiler import Compiler
from server.engine.kernels.threads import Loop
from server.engine.kernels.tiles import TILE_BYTES, configuring, finish_rows, load_configuration, multiply_tiles
from server.engine.kernels.units import CHUNK, COLUMNS, ProductArguments
from server.engine.kernels.vectors import fetch_add, stack_memory

AT = ProductArguments(*range(2, 2 + len(ProductArguments._fields)))
"""Index of each argument."""

SUMS = 32 * COLUMNS * 4
"""Bytes of the sums of 32 rows in float32."""


@dataclass(frozen=True)
class ProductLoops:
    """The product, and the product that is gated: silu of 16 columns, times the next 16."""

    plain: Loop
    gated: Loop


@functools.cache
def product_loops(*, keep: bool) -> ProductLoops:
    """Compile the loops, or load them from numba's cache."""
    plain, gated = (Compiler(name, keep=keep) for name in ("plain", "gated"))
    return ProductLoops(_loop(plain, gated=False), _loop(gated, gated=True))


def _loop(compiler: Compiler, *, gated: bool) -> Loop:
    configure, finish = configuring(compiler), _finishing(compiler, gated=gated)

    @compiler.loop
    def product(arguments):
        a = carray(arguments, 2 + len(AT))
        rows, depth, blocks = a[AT.rows], a[AT.depth], a[AT.columns] // COLUMNS
        few, step, tiles = max(1, min(rows, 16)), 2 * depth, depth // 32
        saved, own, sums = stack_memory(64), stack_memory(64), stack_memory(SUMS)
        configure(few, saved, own)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            block = unit % blocks
            weight = a[AT.weight] + block * tiles * 2 * TILE_BYTES
            start, end = unit // blocks * CHUNK, min(rows, (unit // blocks + 1) * CHUNK)
            row = start
            following, fetched = weight + a[AT.ahead] * tiles * 2 * TILE_BYTES, 32 if end - row <= 32 else 16
            while row < end:
                if end - row >= 32:
                    multiply_tiles(2, 2, a[AT.x] + row * step, step, weight, tiles, sums, 128, following, fetched)
                    finish(a, 32, sums, row, block * COLUMNS)
                    row += 32
                else:
                    row = max(0, min(row, rows - 16))  # tiles have equally many rows, so the last may overlap
                    multiply_tiles(1, 2, a[AT.x] + row * step, step, weight, tiles, sums, 128, following, fetched)
                    finish(a, few, sums, row, block * COLUMNS)
                    row += few
                following += tiles * TILE_BYTES
                if row - start >= 64:
                    fetched = 0
        load_configuration(saved)

    return product


def _finishing(compiler: Compiler, *, gated: bool) -> Any:
    """The function that writes rows of sums to the result."""
    width = COLUMNS // 2 if gated else COLUMNS  # numbers that a unit writes of each row

    @compiler.inline
    def finish(a, rows, sums, row, column):
        step = a[AT.columns] * width // COLUMNS
        place = 2 * (row * step + column * width // COLUMNS)
        out, bias, residual = a[AT.out] + place, a[AT.bias] + 2 * column, a[AT.residual] + place
        if gated and a[AT.bias] != 0:
            finish_rows("bias gate", rows, sums, bias, residual, out, step)
        elif gated:
            finish_rows("gate", rows, sums, bias, residual, out, step)
        elif a[AT.bias] != 0 and a[AT.residual] != 0:
            finish_rows("bias residual", rows, sums, bias, residual, out, step)
        elif a[AT.bias] != 0:
            finish_rows("bias", rows, sums, bias, residual, out, step)
        elif a[AT.residual] != 0:
            finish_rows("residual", rows, sums, bias, residual, out, step)
        else:
            finish_rows("", rows, sums, bias, residual, out, step)

    return finish
