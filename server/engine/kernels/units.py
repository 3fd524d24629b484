"""Sizes of units of work and forms of numbers, shared by compiled loops and their callers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

BLOCK, QUERIES = 64, 16
"""Positions, and tokens, of a chunk that make up a unit of work."""

EVERYTHING = 1 << 40
"""A window that leaves out nothing."""

ROWS = 8
"""Tokens that are one unit of a compiled loop's work."""


class SpanColumns(NamedTuple):
    """The columns of an attention's `spans`, a row for each sequence.

    Attributes:
        first_row: of its tokens in the flat row.
        position: of the first of them in its sequence.
        tokens: that it computes.
        slot: the position at which its slot starts in the cache.
        scratch: its first block of scratch.
    """

    first_row: int
    position: int
    tokens: int
    slot: int
    scratch: int


class AttentionArguments(NamedTuple):
    """What the loops of attention take after the counter and the number of units; all addresses but where it says.

    Attributes:
        units: `[units, 3]` span, key head, block.
        spans: `[spans, 5]`, see `SpanColumns`.
        query: `[heads, tokens, dim]`.
        query_step: numbers from one token to the next.
        query_head_step: numbers from one head to the next.
        key: `[kv_heads, tokens, dim]`, its steps as the query's.
        key_step: as the query's.
        key_head_step: as the query's.
        value: as the key.
        value_step: as the query's.
        value_head_step: as the query's.
        keys: the layer's in the cache.
        values: the layer's in the cache.
        scratch_keys: float32, blocks of `[dim, BLOCK]`.
        scratch_values: float32, blocks of `[BLOCK, dim]`.
        scaling: bits of a float32, see `float_bits`.
        window: positions that a token sees, itself among them.
        out: `[tokens, heads, dim]`.
        sinks: of the query heads, in float32; 0 where there are none.
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
    """A number's bits as float32, in an integer: how compiled loops take it."""
    return int(np.float32(number).view(np.int32))
