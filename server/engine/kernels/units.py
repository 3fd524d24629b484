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


class SpanColumns(NamedTuple):
    """The columns of `spans`, which has a row for each sequence.

    Attributes:
        first_row: row of the sequence's first token in the flat row.
        position: position of that token in its sequence.
        tokens: number of tokens to compute.
        slot: start of the sequence's slot in the cache.
        scratch: index of its first scratch block.
    """

    first_row: int
    position: int
    tokens: int
    slot: int
    scratch: int


class AttentionArguments(NamedTuple):
    """Arguments of the attention loops after the counter and the number of units. Arrays are passed as addresses.

    Attributes:
        units: `[units, 3]` span, key head, block.
        spans: `[spans, 5]`, see `SpanColumns`.
        query: `[heads, tokens, dim]`.
        query_step: numbers from one token to the next.
        query_head_step: numbers from one head to the next.
        key: `[kv_heads, tokens, dim]`.
        key_step: as the query's.
        key_head_step: as the query's.
        value: `[kv_heads, tokens, dim]`.
        value_step: as the query's.
        value_head_step: as the query's.
        keys: the layer's keys in the cache.
        values: the layer's values in the cache.
        scratch_keys: float32, blocks of `[dim, BLOCK]`.
        scratch_values: float32, blocks of `[BLOCK, dim]`.
        scaling: bits of a float32, see `float_bits`.
        window: number of positions that a token sees, including itself.
        out: `[tokens, heads, dim]`.
        sinks: sinks of the query heads, in float32; 0 if there are none.
    """

    units: int
    spans: int
    query: int
    query_step: int
    query_head_step: int
    key: int
    key_step: int
    key_head_step: int
    value: int
    value_step: int
    value_head_step: int
    keys: int
    values: int
    scratch_keys: int
    scratch_values: int
    scaling: int
    window: int
    out: int
    sinks: int


@functools.cache
def float_bits(number: float) -> int:
    """The bits of a number as float32, in an integer, as compiled loops receive it."""
    return int(np.float32(number).view(np.int32))
