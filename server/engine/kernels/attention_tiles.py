"""Parts of the loops of attention for chunks of bfloat16 on processors with AMX.

Rows of tiles are positions. Columns are query rows, one for each token and head. Scores are products of the stored
numbers, summed in float32. A weight is stored as the sum of two numbers of bfloat16, which keeps 16 of its 24 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels.arithmetic import exp
from server.engine.kernels.columns import LANES, add_columns, turn_columns, weigh_columns
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.tiles import multiply_tiles
from server.engine.kernels.units import BLOCK, QUERIES
from server.engine.kernels.vectors import pointer, stack_memory

DEPTH = 32
"""Numbers of a row of a tile of `x`."""
BEYOND = 1 << 20
"""A position that no block has."""


def can_attend_by_tiles(dim: int, stored: Any) -> bool:
    """Whether these parts support heads of a size."""
    return np.dtype(stored) == np.uint16 and dim % DEPTH == 0


def spreading(compiler: Compiler, kv_heads: int, dim: int) -> Any:
    """The function that spreads a block of positions."""
    row = kv_heads * dim

    @compiler.inline
    def spread_block(keys, values, start, filled, keys_at, values_at):
        """Copy a block's keys `[BLOCK, dim]` and values `[dim, BLOCK]`; zeros after the filled positions."""
        plain = carray(pointer(keys_at), (BLOCK, dim), np.uint16)
        turned = carray(pointer(values_at), (dim, BLOCK), np.uint16)
        for i in range(BLOCK):
            if i < filled:
                key, value = keys[(start + i) * row :][:dim], values[(start + i) * row :][:dim]
                for d in range(dim):
                    plain[i, d] = key[d]
                for d in range(dim):
                    turned[d, i] = value[d]
            else:
                for d in range(dim):
                    plain[i, d] = np.uint16(0)
                    turned[d, i] = np.uint16(0)

    return spread_block


def chunks(compiler: Compiler, group: int, kv_heads: int, dim: int) -> Any:
    """The function that attends for a block of queries."""
    row, depth = kv_heads * dim, dim // DEPTH
    queries_bytes, sums_bytes, staged_bytes = QUERIES * group * dim * 2, dim * LANES * 4, LANES * dim * 2
    attend_columns = _attending(compiler, dim)

    @compiler.inline
    def attend_chunk(query, step, head_step, tokens, position, window, scaling, sinks_at, keys_at, values_at, out):
        """Attend for a block of a chunk's tokens, the first at `position`, over the blocks that they see."""
        queries_at, staged_at = stack_memory(queries_bytes), stack_memory(staged_bytes)
        sums_at, highest_at, totals_at = stack_memory(sums_bytes), stack_memory(64), stack_memory(64)
        queries = carray(pointer(queries_at), (group, depth * DEPTH // 2, LANES), np.uint32)  # of pairs of numbers
        queries[:] = 0
        for t in range(tokens):
            for g in range(group):
                asked, r = query[t * step + g * head_step :][:dim], t * group + g
                pairs = queries[r // LANES, :, r % LANES]
                for i in range(dim // 2):
                    pairs[i] = np.uint32(asked[2 * i]) | np.uint32(asked[2 * i + 1]) << np.uint32(16)
        sums = carray(pointer(sums_at), (dim, LANES), np.float32)
        highest = carray(pointer(highest_at), LANES, np.float32)
        totals = carray(pointer(totals_at), LANES, np.float32)
        staged = carray(pointer(staged_at), (LANES, dim), np.uint16)
        first_block = max(0, position - window + 1) // BLOCK
        for column in range((tokens * group + LANES - 1) // LANES):
            sums[:] = 0
            highest[:] = -np.inf
            totals[:] = 0
            r = column * LANES
            for block in range(first_block, (position + tokens - 1) // BLOCK + 1):
                place = block * BLOCK
                sees = position - place, window, tokens
                at = keys_at + place * dim * 4, values_at + place * dim * 4
                attend_columns(queries_at + r * dim * 2, r, group, *sees, scaling, *at, sums_at, highest_at, totals_at)
            if sinks_at != 0:
                sinks = carray(pointer(sinks_at), group, np.float32)
                for lane in range(LANES):
                    totals[lane] += exp(sinks[(r + lane) % group] - highest[lane])
            turn_columns(sums_at, totals_at, staged_at, dim)
            for lane in range(min(LANES, tokens * group - r)):
                answer = out[(r + lane) // group * group * row + (r + lane) % group * dim :][:dim]
                for d in range(dim):
                    answer[d] = staged[lane, d]

    return attend_chunk


def _attending(compiler: Compiler, dim: int) -> Any:
    """The function that attends for 16 rows of queries over one block."""
    depth, added_bytes, weights_bytes, scores_bytes = (
        dim // DEPTH,
        dim * LANES * 4,
        BLOCK * LANES * 2,
        BLOCK * LANES * 4,
    )

    @compiler.inline
    def attend(
        queries_at, r, group, position, window, tokens, scaling, keys_at, values_at, sums_at, highest_at, totals_at
    ):
        """Update sums `[dim, 16]`, maxima and totals; row `r` is the first, and `position` that of the first token."""
        scores_at, scales_at = stack_memory(scores_bytes), stack_memory(64)
        own_at, before_at = stack_memory(64), stack_memory(64)
        upper_at, lower_at = stack_memory(weights_bytes), stack_memory(weights_bytes)
        more_at, less_at = stack_memory(added_bytes), stack_memory(added_bytes)
        own, before = carray(pointer(own_at), LANES, np.int32), carray(pointer(before_at), LANES, np.int32)
        for lane in range(LANES):
            token = (r + lane) // group
            last = position + token if token < tokens else -1
            own[lane] = min(last, BEYOND)
            before[lane] = max(last - window, -1)
        for p in range(0, BLOCK, 32):
            at, into = keys_at + p * dim * 2, scores_at + p * LANES * 4
            multiply_tiles(2, 1, at, dim * 2, queries_at, depth, into, LANES * 4, 0, 0)
        weigh_columns(scores_at, own_at, before_at, scaling, highest_at, totals_at, scales_at, upper_at, lower_at)
        for d in range(0, dim, 32):
            at, into = values_at + d * BLOCK * 2, d * LANES * 4
            multiply_tiles(2, 1, at, BLOCK * 2, upper_at, BLOCK // DEPTH, more_at + into, LANES * 4, 0, 0)
            multiply_tiles(2, 1, at, BLOCK * 2, lower_at, BLOCK // DEPTH, less_at + into, LANES * 4, 0, 0)
        add_columns(sums_at, scales_at, more_at, less_at, dim)

    return attend
