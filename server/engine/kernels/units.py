"""Sizes of units of work and layouts of arguments, shared by compiled loops and their callers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

BLOCK, QUERIES = 64, 16
"""Number of positions, and of query tokens, in a unit of work of a chunk."""

EVERYTHING = 1 << 40
"""A window that excludes nothing."""

ROWS = 8
"""Number of tokens in a unit of work of the small loops."""

COLUMNS, CHUNK = 32, 256
"""Number of columns of weights, and of rows at most, in a unit of work of a product."""

SHARES = 8
"""Number of shares at most into which the units of a product are divided (`shares.py`)."""

TILE_ROWS, TILE_COLUMNS = 16, 32
"""Of a tile of `x`. Rows can lie in tiles: `[rows / 16, columns / 32, 16, 32]`, which the processor reads faster."""

BIAS, RESIDUAL, GATE = 1, 2, 4
"""What is done to the results of a product; the sum of some is its kind (`tiles.finish_rows`)."""


class SpanColumns(NamedTuple):
    """The columns of `spans`, which has a row for each sequence."""

    first_row: int  # of the sequence's first token in the flat row
    position: int  # of that token in its sequence
    tokens: int  # number of tokens to compute
    slot: int  # start of the sequence's slot in the cache
    scratch: int  # index of its first scratch block
    prefix_slot: int  # start of a slot that begins with the same bits, so that many sequences read them from one place
    prefix: int  # number of positions to read there


class AttentionArguments(NamedTuple):
    """Arguments of the attention loops after the counter and the number of units. Arrays are passed as addresses."""

    units: int  # [units, 3]: span, key head, block
    spans: int  # [spans, 7], see `SpanColumns`
    query: int  # [heads, tokens, dim]
    query_step: int  # numbers from one token to the next
    query_head_step: int  # numbers from one head to the next
    key: int  # [kv_heads, tokens, dim]
    key_step: int
    key_head_step: int
    value: int  # [kv_heads, tokens, dim]
    value_step: int
    value_head_step: int
    keys: int  # the layer's keys in the cache
    values: int
    scratch_keys: int  # float32, blocks of [dim, BLOCK]
    scratch_values: int  # float32, blocks of [BLOCK, dim]
    scaling: int  # bits of a float32, see `float_bits`
    window: int  # number of positions that a token sees, including itself
    out: int  # [tokens, heads, dim]
    sinks: int  # float32, of the query heads; 0 if there are none
    threads: int  # number of threads at most


class ProductArguments(NamedTuple):
    """Arguments of a product after the counter and the number of units. Arrays are passed as addresses.

    `SHARES` counters follow, which start as 0.
    """

    rows: int  # of `x`
    depth: int  # columns of `x`, a multiple of 32
    columns: int  # of the weights, a multiple of 32
    x: int  # [rows, depth], in tiles if `x_in_tiles`
    weight: int  # see `tile_weight`
    bias: int  # [columns]; 0 if there is none
    residual: int  # [rows, columns], may be `out`; 0 if there is none
    out: int  # [rows, columns], or half the columns after a gate, in tiles if `out_in_tiles`
    shares: int  # number of threads' shares of the units, at most `SHARES`
    thread: int  # address of OpenMP's `omp_get_thread_num`; 0 if there is none
    x_in_tiles: int  # 1 or 0; if 1, there are fewer than 16 rows, or a multiple of 16
    out_in_tiles: int  # 1 or 0, as for `x`; only after a gate


class LinkColumns(NamedTuple):
    """The columns of the table of links, which has a row for each loop to run; all are int64."""

    function: int  # address of the compiled loop
    arguments: int  # address of its arguments, the first of which is its counter
    entered: int  # number of threads that have entered the loop; starts as 0
    left: int  # number of threads that have left it; starts as 0


@functools.cache
def float_bits(number: float) -> int:
    """The bits of a number as float32, in an integer, as compiled loops receive it."""
    return int(np.float32(number).view(np.int32))
