"""Compiled attention of a step: each sequence attends over its filled positions, in any slot.

Torch's attention needs a batch of equal lengths in neighbouring slots, reads up to the longest and masks the rest.
These loops handle each sequence separately, so its result cannot depend on other sequences. There are two kinds:

- A *decoding* sequence has one token. Its keys and values are read once for all heads, from the cache in place.
- A *chunk* of a prefill has many tokens. Its positions are first widened into scratch memory, in blocks of `BLOCK` with
  transposed keys (`spread`), so that both products of attention are matrix products. Blocks of its queries then pass
  over them with a running maximum and sum, as in FlashAttention (Dao et al. 2022).

Both also store the step's keys and values in the cache.
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
from server.engine.kernels.units import BLOCK, EVERYTHING, QUERIES, AttentionArguments, SpanColumns
from server.engine.kernels.vectors import add_products, dot_products, fetch, fetch_add, lanes, largest, pointer

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
def attention_loops(group: int, kv_heads: int, dim: int, stored: Any, *, keep: bool) -> AttentionLoops:
    """Compile the loops, or load them from numba's cache.

    Args:
        group: query heads that share a key head.
        kv_heads: key heads.
        dim: head size, a multiple of four; multiples of sixteen are fast.
        stored: numpy's `uint16` for bfloat16, or `float32`.
        keep: whether to cache the machine code on disk.
    """
    compiler = Compiler(group, kv_heads, dim, np.dtype(stored), keep=keep)
    given, copy = _inputs(compiler, kv_heads, dim, stored)
    return AttentionLoops(
        _spread_loop(compiler, kv_heads, dim, given, copy),
        _attend_loop(compiler, group, kv_heads, dim, stored, given, copy),
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


def _spread_loop(compiler: Compiler, kv_heads: int, dim: int, given: Any, copy: Any) -> Loop:
    """The loop over chunks' blocks: copies new positions into the cache, and all visible positions into the scratch."""
    spread_block = _spreading(compiler, kv_heads, dim)

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
            turned = carray(pointer(a[AT.scratch_keys] + offset), (dim, BLOCK), np.float32)
            plain = carray(pointer(a[AT.scratch_values] + offset), (BLOCK, dim), np.float32)
            filled = min(BLOCK, position + tokens - block * BLOCK)
            spread_block(keys[head * dim :], values[head * dim :], slot + block * BLOCK, filled, turned, plain)

    return spread


def _attend_loop(compiler: Compiler, group: int, kv_heads: int, dim: int, stored: Any, given: Any, copy: Any) -> Loop:
    """The loop over decoding tokens, and over the blocks of a chunk's queries."""
    heads = group * kv_heads
    decode = _decoding(compiler, group, kv_heads, dim)
    attend_chunk = _chunks(compiler, group, kv_heads, dim)

    @compiler.loop
    def attend(arguments):
        a = carray(arguments, NUM_ARGUMENTS)
        units, spans, query, key, value, keys, values = given(a)
        query_step, query_head_step = a[AT.query_step], a[AT.query_head_step]
        key_step, value_step = a[AT.key_step], a[AT.value_step]
        scaling, window, sinks_at = np.int32(a[AT.scaling]).view(np.float32), a[AT.window], a[AT.sinks]
        out = carray(pointer(a[AT.out]), EVERYTHING, stored)
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
                begin = max(slot, end - window)
                decode(asked, query_head_step, keys, values, first, last, begin, end, scaling, sinks_at, answer)
            else:
                first = block * QUERIES
                asked = query[(first_row + first) * query_step + head * group * query_head_step :]
                offset = (scratch * kv_heads + head * ((position + tokens + BLOCK - 1) // BLOCK)) * BLOCK * dim * 4
                turned = carray(pointer(a[AT.scratch_keys] + offset), EVERYTHING, np.float32)
                plain = carray(pointer(a[AT.scratch_values] + offset), EVERYTHING, np.float32)
                answer = out[((first_row + first) * kv_heads + head) * group * dim :]
                many, start = min(QUERIES, tokens - first), position + first
                sinks = sinks_at + head * group * 4 if sinks_at != 0 else 0
                steps = query_step, query_head_step
                attend_chunk(asked, *steps, many, start, window, scaling, sinks, turned, plain, answer)

    return attend


def _scoring(compiler: Compiler, group: int, kv_heads: int, dim: int) -> Any:
    """The function that computes a decoding token's scores."""
    row, at_once = kv_heads * dim, lanes(dim)

    @compiler.inline
    def score(queries, keys, values, start, count, first, last, scores):
        """Compute `scores` `[kv_heads * group, width]` of `count` positions, for key heads `first` to `last`."""
        width, flat = scores.shape[1], scores.reshape(-1)
        whole = count - count % at_once
        for p in range(0, whole, at_once):
            fetch(keys, (start + p + 2 * at_once) * row + first * dim, (start + p + 3 * at_once) * row + first * dim)
            fetch(values, (start + p) * row + first * dim, (start + p + at_once) * row + first * dim)
            for head in range(first, last):
                place, own = (start + p) * row + head * dim, head * group
                dot_products(group, dim, queries, own * dim, keys, place, row, flat, own * width + p, width)
        if whole == count:
            return
        rest = np.zeros(at_once * dim, np.float32)
        for head in range(first, last):
            for p in range(count - whole):
                key = keys[(start + whole + p) * row + head * dim :][:dim]
                for d in range(dim):
                    rest[p * dim + d] = widen(key[d])
            own = head * group
            dot_products(group, dim, queries, own * dim, rest, 0, dim, flat, own * width + whole, width)

    return score


def _decoding(compiler: Compiler, group: int, kv_heads: int, dim: int) -> Any:
    """The function that attends for one token."""
    heads, row, at_once = group * kv_heads, kv_heads * dim, lanes(dim)
    score = _scoring(compiler, group, kv_heads, dim)

    @compiler.inline
    def decode(query, head_step, keys, values, first, last, start, end, scaling, sinks_at, out):
        """Attend for one token over positions `start` to `end`, for the query heads of key heads `first` to `last`."""
        count = end - start
        width = (count + at_once - 1) // at_once * at_once
        queries = np.empty((heads, dim), np.float32)
        for h in range(first * group, last * group):
            asked = query[h * head_step :][:dim]
            for d in range(dim):
                queries[h, d] = widen(asked[d]) * scaling
        scores = np.empty((heads, width), np.float32)
        score(queries.reshape(-1), keys, values, start, count, first, last, scores)
        totals = np.empty(heads, np.float32)
        for h in range(first * group, last * group):
            own = scores[h]
            own[count:] = -np.inf
            highest, total = largest(at_once, own, 0, width), np.float32(0)
            for p in range(count):
                weight = exp(own[p] - highest)
                own[p] = weight
                total += weight
            if sinks_at != 0:
                total += exp(carray(pointer(sinks_at), heads, np.float32)[h] - highest)
            totals[h] = total
        sums = np.zeros((heads, dim), np.float32)
        flat, all_sums = scores.reshape(-1), sums.reshape(-1)
        for p in range(0, count, BLOCK):
            for head in range(first, last):
                place, own, some = (start + p) * row + head * dim, head * group, min(BLOCK, count - p)
                add_products(group, dim, flat, own * width + p, width, values, place, row, all_sums, own * dim, some)
        for h in range(first * group, last * group):
            share, answer = np.float32(1) / totals[h], out[h * dim :][:dim]
            for d in range(dim):
                answer[d] = narrow(sums[h, d] * share, out)

    return decode


def _spreading(compiler: Compiler, kv_heads: int, dim: int) -> Any:
    """The function that spreads a block of positions."""
    row = kv_heads * dim

    @compiler.inline
    def spread_block(keys, values, start, filled, turned, plain):
        """Copy a block's keys `[dim, BLOCK]` and values `[BLOCK, dim]` as float32; zeros after the filled positions."""
        for i in range(BLOCK):
            if i < filled:
                key, value = keys[(start + i) * row :][:dim], values[(start + i) * row :][:dim]
                for d in range(dim):
                    turned[d, i] = widen(key[d])
                    plain[i, d] = widen(value[d])
            else:
                for d in range(dim):
                    turned[d, i] = np.float32(0)
                    plain[i, d] = np.float32(0)

    return spread_block


def _weighing(compiler: Compiler, dim: int) -> Any:
    """The function that turns the scores of one query and one block into weights."""

    @compiler.inline
    def weigh(scores, first, last, highest, total, sums):
        """Turn the scores of one query into weights, zero for invisible positions; returns the new maximum and sum.

        The query sees the block's positions `first` to `last`. Earlier sums are scaled down if the maximum has grown.
        """
        for i in range(first):
            scores[i] = -np.inf
        for i in range(last, BLOCK):
            scores[i] = -np.inf
        before = highest
        highest = max(before, largest(BLOCK, scores, 0, BLOCK))
        added = np.float32(0)
        for i in range(BLOCK):
            weight = exp(scores[i] - highest)
            scores[i] = weight
            added += weight
        for i in range(first):
            scores[i] = np.float32(0)
        for i in range(last, BLOCK):
            scores[i] = np.float32(0)
        if highest > before:
            scale = exp(before - highest)
            total *= scale
            for d in range(dim):
                sums[d] *= scale
        return highest, total + added

    return weigh


def _chunks(compiler: Compiler, group: int, kv_heads: int, dim: int) -> Any:
    """The function that attends for a block of queries."""
    rows, row = QUERIES * group, kv_heads * dim
    weigh = _weighing(compiler, dim)

    @compiler.inline
    def attend_chunk(query, step, head_step, tokens, position, window, scaling, sinks_at, turned, plain, out):
        """Attend for a block of a chunk's tokens, the first at `position`, over the blocks that they see."""
        queries = np.zeros((rows, dim), np.float32)
        for t in range(tokens):
            for g in range(group):
                asked = query[t * step + g * head_step :][:dim]
                for d in range(dim):
                    queries[t * group + g, d] = widen(asked[d]) * scaling
        sums = np.zeros((rows, dim), np.float32)
        totals, highest = np.zeros(rows, np.float32), np.full(rows, -np.inf, np.float32)
        for block in range(max(0, position - window + 1) // BLOCK, (position + tokens - 1) // BLOCK + 1):
            scores = np.zeros((rows, BLOCK), np.float32)
            place = block * BLOCK * dim
            add_products(rows, BLOCK, queries.reshape(-1), 0, dim, turned, place, BLOCK, scores.reshape(-1), 0, dim)
            for r in range(tokens * group):
                own = position + r // group - block * BLOCK
                first, last = min(max(own - window + 1, 0), BLOCK), min(own + 1, BLOCK)
                if first < last:
                    highest[r], totals[r] = weigh(scores[r], first, last, highest[r], totals[r], sums[r])
                else:
                    scores[r] = np.float32(0)
            add_products(rows, dim, scores.reshape(-1), 0, BLOCK, plain, place, dim, sums.reshape(-1), 0, BLOCK)
        for t in range(tokens):
            for g in range(group):
                r = t * group + g
                if sinks_at != 0:
                    totals[r] += exp(carray(pointer(sinks_at), group, np.float32)[g] - highest[r])
                share = np.float32(1) / totals[r]
                answer = out[t * group * row + g * dim :][:dim]
                for d in range(dim):
                    answer[d] = narrow(sums[r, d] * share, out)

    return attend_chunk
