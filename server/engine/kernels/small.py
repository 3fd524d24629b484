"""The small operations between a layer's matrix products, compiled: norm, rotary embedding, gate; and rows of logits.

The innermost loops run over adjacent numbers, so that they compile to vector instructions. They compute in float32,
whatever the stored dtype.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels.arithmetic import exp, narrow, widen
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.threads import Loop
from server.engine.kernels.units import EVERYTHING, ROWS, TILE_COLUMNS, TILE_ROWS
from server.engine.kernels.vectors import WIDEST, fetch_add, largest, pointer

PART = 512
"""Numbers that are added up in float32."""


@dataclass(frozen=True)
class SmallLoops:
    """Loops over tokens; a unit of work is `ROWS` tokens, or one row of logits.

    After the counter and the number of units, all loops take addresses and numbers. Loops over tokens take the number
    of tokens first.

    Attributes:
        rms_norm: `x`, `weight`, `out`, their width, the bits of epsilon as float32, whether `out` is in tiles.
        rotate: `x` `[tokens, all_heads, dim]`, rotated in place; `cos` and `sin` `[tokens, dim]` in float32, the first
            half of `sin` negated; number of all heads, number of rotated heads, `dim`.
        silu_gate: `gate_up` `[tokens, 2 * width]`, `out` `[tokens, width]`, the width.
        best: logits `[rows, width]`; out: the largest number of each row in float32, NaN if the row contains one; out:
            its first index in int64; the width.
        totals: logits `[rows, width]`; out: the largest number of each row in float32; out: the sum of
            `exp(number - largest)` in float64, NaN if the row contains one; the width.
        gather: the indices of `tokens` rows in int64, `x`, `out`, their width.
    """

    rms_norm: Loop
    rotate: Loop
    silu_gate: Loop
    best: Loop
    totals: Loop
    gather: Loop


@functools.cache
def small_loops(stored: Any, *, keep: bool) -> SmallLoops:
    """Compile the loops, or load them from numba's cache; `stored` is `uint16` for bfloat16, or `float32`."""
    compiler = Compiler(np.dtype(stored), keep=keep)
    return SmallLoops(
        _norm_loop(compiler, stored),
        _rotation_loop(compiler, stored),
        _gate_loop(compiler, stored),
        _best_loop(compiler, stored),
        _totals_loop(compiler, stored),
        _gather_loop(compiler, stored),
    )


def _norm_loop(compiler: Compiler, stored: Any) -> Loop:
    @compiler.inline
    def norm_row(x, weight, epsilon, out, piece, step):
        """RMS norm (Zhang and Sennrich 2019), written in pieces that begin `step` numbers apart.

        As in transformers, the normed number is rounded before it is weighted.
        """
        width = len(x)
        total = np.float32(0)
        for i in range(width):
            number = widen(x[i])
            total += number * number
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
        for start in range(0, width, piece):
            numbers, factors, into = x[start:][:piece], weight[start:][:piece], out[start // piece * step :][:piece]
            for i in range(piece):
                normed = widen(narrow(widen(numbers[i]) * scale, into))
                into[i] = narrow(normed * widen(factors[i]), into)

    @compiler.loop
    def rms_norm(arguments):
        a = carray(arguments, 9)
        tokens, width, epsilon, in_tiles = a[2], a[6], np.int32(a[7]).view(np.float32), a[8]
        x, out = carray(pointer(a[3]), (tokens, width), stored), carray(pointer(a[5]), EVERYTHING, stored)
        piece, step = (TILE_COLUMNS, TILE_ROWS * TILE_COLUMNS) if in_tiles else (width, width)
        weight = carray(pointer(a[4]), width, stored)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            for t in range(unit * ROWS, min(tokens, (unit + 1) * ROWS)):
                tile, row = (t // TILE_ROWS * TILE_ROWS, t % TILE_ROWS) if in_tiles else (t, 0)
                norm_row(x[t], weight, epsilon, out[tile * width + row * TILE_COLUMNS :], piece, step)

    return rms_norm


def _rotation_loop(compiler: Compiler, stored: Any) -> Loop:
    @compiler.inline
    def rotate_head(x, cos, sin):
        """Rotary embedding (Su et al. 2021), halves paired as in transformers."""
        half = len(x) // 2
        for i in range(half):
            first, second = widen(x[i]), widen(x[half + i])
            x[i] = narrow(first * cos[i] + second * sin[i], x)
            x[half + i] = narrow(second * cos[half + i] + first * sin[half + i], x)

    @compiler.loop
    def rotate(arguments):
        a = carray(arguments, 9)
        tokens, heads, turned, dim = a[2], a[6], a[7], a[8]
        x = carray(pointer(a[3]), (tokens, heads, dim), stored)
        cos, sin = carray(pointer(a[4]), (tokens, dim), np.float32), carray(pointer(a[5]), (tokens, dim), np.float32)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            for t in range(unit * ROWS, min(tokens, (unit + 1) * ROWS)):
                for h in range(turned):
                    rotate_head(x[t, h], cos[t], sin[t])

    return rotate


def _gate_loop(compiler: Compiler, stored: Any) -> Loop:
    @compiler.inline
    def gate_row(gate, up, out):
        """silu(gate) * up."""
        for i in range(len(out)):
            number = widen(gate[i])
            out[i] = narrow(number / (np.float32(1) + exp(-number)) * widen(up[i]), out)

    @compiler.loop
    def silu_gate(arguments):
        a = carray(arguments, 6)
        tokens, width = a[2], a[5]
        gate_up = carray(pointer(a[3]), (tokens, 2, width), stored)
        out = carray(pointer(a[4]), (tokens, width), stored)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            for t in range(unit * ROWS, min(tokens, (unit + 1) * ROWS)):
                gate_row(gate_up[t, 0], gate_up[t, 1], out[t])

    return silu_gate


def _highest_of(compiler: Compiler) -> Any:
    @compiler.inline
    def highest_of(row):
        """The largest number of a row, ignoring NaN."""
        whole = len(row) - len(row) % WIDEST
        highest = largest(WIDEST, row, 0, whole)
        for i in range(whole, len(row)):
            highest = max(highest, widen(row[i]))
        return highest

    return highest_of


def _best_loop(compiler: Compiler, stored: Any) -> Loop:
    highest_of = _highest_of(compiler)

    @compiler.inline
    def best_of(row):
        """The largest number of a row, and its first index."""
        highest = highest_of(row)
        wrong = np.int32(0)
        for i in range(len(row)):
            number = widen(row[i])
            wrong |= np.int32(number != number)
        if wrong:
            return np.float32(np.nan), 0
        for i in range(len(row)):
            if widen(row[i]) == highest:
                return highest, i
        return highest, 0

    @compiler.loop
    def best(arguments):
        a = carray(arguments, 6)
        logits = carray(pointer(a[2]), (a[1], a[5]), stored)
        highest, where = carray(pointer(a[3]), a[1], np.float32), carray(pointer(a[4]), a[1], np.int64)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            highest[unit], where[unit] = best_of(logits[unit])

    return best


def _totals_loop(compiler: Compiler, stored: Any) -> Loop:
    highest_of = _highest_of(compiler)

    @compiler.inline
    def total_of(row, highest):
        """The sum of `exp(number - highest)`, in parts, so that float32 loses nothing in a long row."""
        total = np.float64(0)
        for first in range(0, len(row), PART):
            part = np.float32(0)
            for i in range(first, min(len(row), first + PART)):
                part += exp(widen(row[i]) - highest)
            total += part
        return total

    @compiler.loop
    def totals(arguments):
        a = carray(arguments, 6)
        logits = carray(pointer(a[2]), (a[1], a[5]), stored)
        highest, total = carray(pointer(a[3]), a[1], np.float32), carray(pointer(a[4]), a[1], np.float64)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            highest[unit] = highest_of(logits[unit])
            total[unit] = total_of(logits[unit], highest[unit])

    return totals


def _gather_loop(compiler: Compiler, stored: Any) -> Loop:
    @compiler.loop
    def gather(arguments):
        a = carray(arguments, 7)
        rows, width = a[2], a[6]
        indices, out = carray(pointer(a[3]), rows, np.int64), carray(pointer(a[5]), (rows, width), stored)
        x = carray(pointer(a[4]), EVERYTHING, stored)
        while True:
            unit = fetch_add(a)
            if unit >= a[1]:
                break
            for r in range(unit * ROWS, min(rows, (unit + 1) * ROWS)):
                row = x[indices[r] * width :][:width]
                for i in range(width):
                    out[r, i] = row[i]

    return gather
