"""Parts of the loops of attention for every processor and dtype; vector instructions compute them in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels.arithmetic import exp, narrow, widen
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.units import BLOCK, EVERYTHING, QUERIES
from server.engine.kernels.vectors import add_products, dot_products, lanes, largest, pointer


def _scoring(compiler: Compiler, group: int, kv_heads: int, dim: int) -> Any:
    """The function that computes a decoding token's scores."""
    row, at_once = kv_heads * dim, lanes(dim)

    @compiler.inline
    def score(queries, keys, start, count, first, last, width, flat, ahead, end):
        """Compute scores `[kv_heads * group, width]` of `count` positions, for key heads `first` to `last`.

        Fetches keys of the positions `ahead` to `end` meanwhile.
        """
        whole = count - count % at_once
        for p in range(0, whole, at_once):
            fetched = ahead + p if ahead + p < end else start + p
            for head in range(first, last):
                place, own = (start + p) * row + head * dim, head * group
                after = fetched * row + head * dim
                dot_products(group, dim, queries, own * dim, keys, place, row, flat, own * width + p, width, after)
        if whole == count:
            return
        rest = np.zeros(at_once * dim, np.float32)
        for head in range(first, last):
            for p in range(count - whole):
                key = keys[(start + whole + p) * row + head * dim :][:dim]
                for d in range(dim):
                    rest[p * dim + d] = widen(key[d])
            own = head * group
            dot_products(group, dim, queries, own * dim, rest, 0, dim, flat, own * width + whole, width, None)

    return score


def decoding(compiler: Compiler, group: int, kv_heads: int, dim: int) -> Any:
    """The function that attends for one token."""
    heads, row, at_once = group * kv_heads, kv_heads * dim, lanes(dim)
    score = _scoring(compiler, group, kv_heads, dim)

    @compiler.inline
    def decode(query, head_step, keys, values, first, last, parts, ahead, scaling, sinks_at, out):
        """Attend for one token, for the query heads of key heads `first` to `last`.

        `parts` are the first position in the shared prefix and how many are read there, and the first and last position
        in the sequence's own slot. `ahead` are the first and last of the positions that the thread will probably read
        next; it fetches them into its cache meanwhile.
        """
        shared_start, shared, start, end = parts
        count = shared + end - start
        width = (count + at_once - 1) // at_once * at_once
        queries = np.empty((heads, dim), np.float32)
        for h in range(first * group, last * group):
            asked = query[h * head_step :][:dim]
            for d in range(dim):
                queries[h, d] = widen(asked[d]) * scaling
        scores = np.empty((heads, width), np.float32)
        flat = scores.reshape(-1)
        given, (fetched, fetched_end) = (queries.reshape(-1), keys), ahead
        score(*given, shared_start, shared, first, last, width, flat, fetched, fetched_end)
        score(*given, start, count - shared, first, last, width, flat[shared:], fetched + shared, fetched_end)
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
        all_sums = sums.reshape(-1)
        for part in range(2):
            base, p, stop = (shared_start, 0, shared) if part == 0 else (start - shared, shared, count)
            while p < stop:
                some = min(BLOCK, stop - p)
                next_place = fetched + p if fetched + p < fetched_end else base + p
                for head in range(first, last):
                    at, own, after = (base + p) * row + head * dim, head * group, next_place * row + head * dim
                    weight = own * width + p
                    add_products(group, dim, flat, weight, width, values, at, row, all_sums, own * dim, some, after)
                p += some
        for h in range(first * group, last * group):
            share, answer = np.float32(1) / totals[h], out[h * dim :][:dim]
            for d in range(dim):
                answer[d] = narrow(sums[h, d] * share, out)

    return decode


def spreading(compiler: Compiler, kv_heads: int, dim: int) -> Any:
    """The function that spreads a block of positions."""
    row = kv_heads * dim

    @compiler.inline
    def spread_block(keys, values, start, filled, keys_at, values_at):
        """Copy a block's keys `[dim, BLOCK]` and values `[BLOCK, dim]` as float32; zeros after the filled positions."""
        turned = carray(pointer(keys_at), (dim, BLOCK), np.float32)
        plain = carray(pointer(values_at), (BLOCK, dim), np.float32)
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


def weighing(compiler: Compiler, dim: int) -> Any:
    """The function that turns the scores of one query and one block into weights."""

    @compiler.inline
    def weigh(scores, first, last, highest, total, sums):
        """Turn the scores of one query into weights, zero for invisible positions; returns the new maximum and sum.

        The query sees the block's positions `first` to `last`. Earlier sums are scaled down if the maximum has grown.
        """
        before, lowest = highest, np.float32(-np.inf)
        for i in range(BLOCK):
            scores[i] = scores[i] if (i >= first) & (i < last) else lowest
        highest = max(before, largest(BLOCK, scores, 0, BLOCK))
        added = np.float32(0)
        for i in range(BLOCK):
            weight = exp(scores[i] - highest)
            scores[i] = weight if (i >= first) & (i < last) else np.float32(0)
            added += scores[i]
        if highest > before:
            scale = exp(before - highest)
            total *= scale
            for d in range(dim):
                sums[d] *= scale
        return highest, total + added

    return weigh


def chunks(compiler: Compiler, group: int, kv_heads: int, dim: int) -> Any:
    """The function that attends for a block of queries."""
    rows, row = QUERIES * group, kv_heads * dim
    weigh = weighing(compiler, dim)

    @compiler.inline
    def attend_chunk(query, step, head_step, tokens, position, window, scaling, sinks_at, keys_at, values_at, out):
        """Attend for a block of a chunk's tokens, the first at `position`, over the blocks that they see."""
        turned = carray(pointer(keys_at), EVERYTHING, np.float32)
        plain = carray(pointer(values_at), EVERYTHING, np.float32)
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
            add_products(
                rows, BLOCK, queries.reshape(-1), 0, dim, turned, place, BLOCK, scores.reshape(-1), 0, dim, None
            )
            for r in range(tokens * group):
                own = position + r // group - block * BLOCK
                first, last = min(max(own - window + 1, 0), BLOCK), min(own + 1, BLOCK)
                if first < last:
                    highest[r], totals[r] = weigh(scores[r], first, last, highest[r], totals[r], sums[r])
                else:
                    scores[r] = np.float32(0)
            add_products(rows, dim, scores.reshape(-1), 0, BLOCK, plain, place, dim, sums.reshape(-1), 0, BLOCK, None)
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
