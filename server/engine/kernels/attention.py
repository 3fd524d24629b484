"""Compiled attention of a step: each sequence attends over its filled positions, in any slot.

Torch's attention needs a batch of equal lengths in neighbouring slots, reads up to the longest and masks the rest.
These loops handle each sequence separately, so its result cannot depend on other sequences. There are two kinds:

- A *decoding* sequence has one token. Its keys and values are read once for all heads, from the cache in place. Those
  of a soft prompt that several sequences use are read from one slot, so that most come from the processor's cache. The
  others are fetched while the sequence before is computed.
- A *chunk* of a prefill has many tokens. Its positions are first copied into scratch memory (`spread`), in blocks of
  `BLOCK` and in the layout that matrix products need. Blocks of its queries then pass over them with a running maximum
  and sum, as in FlashAttention (Dao et al. 2022). AMX computes the products where it can (`attention_tiles.py`).

Both also store the step's keys and values in the cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels import attention_tiles, attention_vectors
from server.engine.kernels.attention_tiles import can_attend_by_tiles
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.threads import Loop
from server.engine.kernels.tiles import configuring, load_configuration
from server.engine.kernels.units import BLOCK, EVERYTHING, QUERIES, AttentionArguments, SpanColumns
from server.engine.kernels.vectors import fetch_add, lanes, pointer, stack_memory

NUM_UNITS = 1
"""Index of the number of units in a loop's arguments; index 0 is the counter."""
AT = AttentionArguments(*range(NUM_UNITS + 1, NUM_UNITS + 1 + len(AttentionArguments._fields)))
"""Index of each further argument."""
NUM_ARGUMENTS = NUM_UNITS + 1 + len(AT)
COLUMN = SpanColumns(*range(len(SpanColumns._fields)))


@dataclass(frozen=True)
class AttentionLoops:
    """The two loops of a step's attention, for one shape of heads; both take `AttentionArguments`."""

    spread: Loop  # copies a chunk's positions into cache and scratch; a unit is (span, key head, block)
    attend: Loop  # a unit is (span, key head, block of queries), with block -1 for a decoding token


@functools.cache
def attention_loops(group: int, kv_heads: int, dim: int, stored: Any, *, tiles: bool, keep: bool) -> AttentionLoops:
    """Compile the loops, or load them from numba's cache.

    Args:
        group: query heads that share a key head.
        kv_heads: key heads.
        dim: head size, a multiple of four; multiples of sixteen are fast.
        stored: numpy's `uint16` for bfloat16, or `float32`.
        tiles: whether the process may use AMX; where the shape does not suit it, vectors are used nevertheless.
        keep: whether to cache the machine code on disk.
    """
    tiles = tiles and can_attend_by_tiles(dim, stored)
    compiler = Compiler(group, kv_heads, dim, np.dtype(stored), "tiles" if tiles else "vectors", keep=keep)
    given, copy = _inputs(compiler, kv_heads, dim, stored)
    return AttentionLoops(
        _spread_loop(compiler, kv_heads, dim, given, copy, tiles=tiles),
        _attend_loop(compiler, group, kv_heads, dim, stored, given, copy, tiles=tiles),
    )


def _inputs(compiler: Compiler, kv_heads: int, dim: int, stored: Any) -> tuple[Any, Any]:
    """The functions that read a loop's arguments as arrays, and that copy new tokens into the cache."""
    row = kv_heads * dim  # numbers per position in the cache

    @compiler.inline
    def copy(source, step, head_step, head, tokens, states, start):
        """Copy keys or values of new tokens into the cache."""
        for t in range(tokens):
            new, kept = source[t * step + head * head_step :][:dim], states[(start + t) * row + head * dim :][:dim]
            for d in range(dim):
                kept[d] = new[d]

    @compiler.inline
    def given(a):
        """The arrays that both loops use: units, spans; query, key, value; keys and values in the cache."""
        units = carray(pointer(a[AT.units]), (a[NUM_UNITS], 3), np.int64)
        spans = carray(pointer(a[AT.spans]), (EVERYTHING, len(COLUMN)), np.int64)
        query = carray(pointer(a[AT.query]), EVERYTHING, stored)
        key, value = carray(pointer(a[AT.key]), EVERYTHING, stored), carray(pointer(a[AT.value]), EVERYTHING, stored)
        keys = carray(pointer(a[AT.keys]), EVERYTHING, stored)
        values = carray(pointer(a[AT.values]), EVERYTHING, stored)
        return units, spans, query, key, value, keys, values

    return given, copy


def _spread_loop(compiler: Compiler, kv_heads: int, dim: int, given: Any, copy: Any, *, tiles: bool) -> Loop:
    """The loop over chunks' blocks: copies new positions into the cache, and all visible positions into the scratch."""
    spread_block = (attention_tiles if tiles else attention_vectors).spreading(compiler, kv_heads, dim)

    @compiler.loop
    def spread(arguments):
        a = carray(arguments, NUM_ARGUMENTS)
        units, spans, _, key, value, keys, values = given(a)
        key_step, value_step = a[AT.key_step], a[AT.value_step]
        while True:
            unit = fetch_add(a)
            if unit >= a[NUM_UNITS]:
                break
            span, head, block = units[unit, 0], units[unit, 1], units[unit, 2]
            first_row, position = spans[span, COLUMN.first_row], spans[span, COLUMN.position]
            tokens, slot, scratch = spans[span, COLUMN.tokens], spans[span, COLUMN.slot], spans[span, COLUMN.scratch]
            blocks = (position + tokens + BLOCK - 1) // BLOCK
            begin, end = max(position, block * BLOCK), min(position + tokens, (block + 1) * BLOCK)
            if begin < end:
                new, many = first_row + begin - position, end - begin
                copy(key[new * key_step :], key_step, a[AT.key_head_step], head, many, keys, slot + begin)
                copy(value[new * value_step :], value_step, a[AT.value_head_step], head, many, values, slot + begin)
            offset = ((scratch * kv_heads + head * blocks) + block) * BLOCK * dim * 4
            filled = min(BLOCK, position + tokens - block * BLOCK)
            keys_at, values_at = a[AT.scratch_keys] + offset, a[AT.scratch_values] + offset
            spread_block(keys[head * dim :], values[head * dim :], slot + block * BLOCK, filled, keys_at, values_at)

    return spread


def _locating(compiler: Compiler) -> Any:
    """The function that says which positions a unit of a decoding token will read."""

    @compiler.inline
    def own_positions(a, units, spans, unit, window):
        """The first and last of them in its own slot; 0 and 0 if there is no such unit for all heads."""
        if unit >= a[NUM_UNITS] or units[unit, 1] >= 0:
            return 0, 0
        slot, position = spans[units[unit, 0], COLUMN.slot], spans[units[unit, 0], COLUMN.position]
        return slot + max(spans[units[unit, 0], COLUMN.prefix], position + 1 - window), slot + position

    return own_positions


def _attend_loop(
    compiler: Compiler, group: int, kv_heads: int, dim: int, stored: Any, given: Any, copy: Any, *, tiles: bool
) -> Loop:
    """The loop over decoding tokens, and over the blocks of a chunk's queries."""
    heads, at_once = group * kv_heads, lanes(dim)
    parts = attention_tiles if tiles else attention_vectors
    decode = attention_vectors.decoding(compiler, group, kv_heads, dim)
    attend_chunk = parts.chunks(compiler, group, kv_heads, dim)
    own_positions, configure = _locating(compiler), configuring(compiler)

    @compiler.loop
    def attend(arguments):
        a = carray(arguments, NUM_ARGUMENTS)
        units, spans, query, key, value, keys, values = given(a)
        query_step, query_head_step = a[AT.query_step], a[AT.query_head_step]
        key_step, value_step = a[AT.key_step], a[AT.value_step]
        scaling, window, sinks_at = np.int32(a[AT.scaling]).view(np.float32), a[AT.window], a[AT.sinks]
        out = carray(pointer(a[AT.out]), EVERYTHING, stored)
        saved, own = stack_memory(64), stack_memory(64)
        if tiles:
            configure(16, saved, own)
        while True:
            unit = fetch_add(a)
            if unit >= a[NUM_UNITS]:
                break
            span, head, block = units[unit, 0], units[unit, 1], units[unit, 2]
            first_row, position = spans[span, COLUMN.first_row], spans[span, COLUMN.position]
            tokens, slot, scratch = spans[span, COLUMN.tokens], spans[span, COLUMN.slot], spans[span, COLUMN.scratch]
            if block < 0:
                first, last = (0, kv_heads) if head < 0 else (head, head + 1)
                end = slot + position + 1
                for h in range(first, last):
                    copy(key[first_row * key_step :], key_step, a[AT.key_head_step], h, 1, keys, end - 1)
                    copy(value[first_row * value_step :], value_step, a[AT.value_head_step], h, 1, values, end - 1)
                asked, answer = query[first_row * query_step :], out[first_row * heads * dim :]
                skipped = max(0, position + 1 - window)
                shared = max(0, spans[span, COLUMN.prefix] - skipped) // at_once * at_once
                parts = spans[span, COLUMN.prefix_slot] + skipped, shared, slot + skipped + shared, end
                # If units take equally long, threads take them in turn, so this is the thread's next one.
                ahead = own_positions(a, units, spans, unit + a[AT.threads], window)
                decode(asked, query_head_step, keys, values, first, last, parts, ahead, scaling, sinks_at, answer)
            else:
                first = block * QUERIES
                asked = query[(first_row + first) * query_step + head * group * query_head_step :]
                offset = (scratch * kv_heads + head * ((position + tokens + BLOCK - 1) // BLOCK)) * BLOCK * dim * 4
                scratch_at = a[AT.scratch_keys] + offset, a[AT.scratch_values] + offset
                answer = out[((first_row + first) * kv_heads + head) * group * dim :]
                many, start = min(QUERIES, tokens - first), position + first
                sinks = sinks_at + head * group * 4 if sinks_at != 0 else 0
                steps = query_step, query_head_step
                attend_chunk(asked, *steps, many, start, window, scaling, sinks, *scratch_at, answer)
        if tiles:
            load_configuration(saved)

    return attend
