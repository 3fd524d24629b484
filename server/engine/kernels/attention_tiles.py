"""Parts of the loops of attention for chunks of bfloat16 on processors with AMX.

Rows of tiles are positions. Columns are query rows, one for each token and head. Scores are products of the stored
numbers, summed in float32. A weight is stored as the sum of two numbers of bfloat16, which keeps 16 of its 24 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels.arithmetic import exp
from server.engine.kernels.columns import (
    LANES,
    add_columns,
    mask_columns,
    turn_columns,
    turn_rows,
    turn_values,
    weigh_columns,
)
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.tiles import multiply_tiles
from server.engine.kernels.units import BLOCK, TILE_COLUMNS
from server.engine.kernels.vectors import pointer, stack_memory


def can_attend_by_tiles(dim: int, stored: Any) -> bool:
    """Whether these parts support heads of a size."""
    return np.dtype(stored) == np.uint16 and dim % TILE_COLUMNS == 0


def spreading(compiler: Compiler, kv_heads: int, dim: int) -> Any:
    """The function that spreads a block of positions."""
    row = kv_heads * dim

    @compiler.inline
    def spread_block(keys, values, start, filled, keys_at, values_at):
        """Copy a block's keys `[BLOCK, dim]` and values `[dim, BLOCK]`; zeros after the filled positions."""
        plain = carray(pointer(keys_at), (BLOCK, dim), np.uint16)
        for i in range(filled):
            key = keys[(start + i) * row :][:dim]
            for d in range(dim):
                plain[i, d] = key[d]
        plain[filled:] = 0
        turn_values(values[start * row :].ctypes.data, row * 2, filled, values_at, dim)

    return spread_block


def chunks(compiler: Compiler, group: int, kv_heads: int, dim: int) -> Any:
    """The function that attends for a block of queries."""
    row, staged_bytes, sums_bytes = kv_heads * dim, LANES * dim * 2, dim * LANES * 4
    attend_columns = _attending(compiler, dim)

    @compiler.inline
    def attend_chunk(query, step, head_step, tokens, position, window, scaling, sinks_at, keys_at, values_at, out):
        """Attend for a block of a chunk's tokens, the first at `position`, over the blocks that they see."""
        queries_at, staged_at = stack_memory(staged_bytes), stack_memory(staged_bytes)
        sums_at, highest_at, totals_at = stack_memory(sums_bytes), stack_memory(64), stack_memory(64)
        own_at, before_at = stack_memory(64), stack_memory(64)
        own, before = carray(pointer(own_at), LANES, np.int32), carray(pointer(before_at), LANES, np.int32)
        sums = carray(pointer(sums_at), (dim, LANES), np.float32)
        highest = carray(pointer(highest_at), LANES, np.float32)
        totals = carray(pointer(totals_at), LANES, np.float32)
        staged = carray(pointer(staged_at), (LANES, dim), np.uint16)
        first_block, last_block = max(0, position - window + 1) // BLOCK, (position + tokens - 1) // BLOCK
        for r in range(0, tokens * group, LANES):
            lanes = min(LANES, tokens * group - r)
            for lane in range(lanes):
                asked = query[(r + lane) // group * step + (r + lane) % group * head_step :][:dim]
                for d in range(dim):
                    staged[lane, d] = asked[d]
            staged[lanes:] = 0
            turn_rows(staged_at, queries_at, dim // 2)
            sums[:] = 0
            highest[:] = -np.inf
            totals[:] = 0
            first, last = position + r // group, position + (r + lanes - 1) // group  # of the lanes' positions
            for block in range(first_block, last_block + 1):
                place = block * BLOCK
                masks = first - place < BLOCK - 1 or last - place >= window
                if masks:
                    for lane in range(LANES):
                        own[lane] = min(position + (r + lane) // group - place, BLOCK)
                        before[lane] = max(position + (r + lane) // group - place - window, -1)
                at = keys_at + place * dim * 4, values_at + place * dim * 4
                attend_columns(queries_at, masks, own_at, before_at, scaling, *at, sums_at, highest_at, totals_at)
            if sinks_at != 0:
                sinks = carray(pointer(sinks_at), group, np.float32)
                for lane in range(LANES):
                    totals[lane] += exp(sinks[(r + lane) % group] - highest[lane])
            turn_columns(sums_at, totals_at, staged_at, dim)
            for lane in range(lanes):
                answer = out[(r + lane) // group * group * row + (r + lane) % group * dim :][:dim]
                for d in range(dim):
                    answer[d] = staged[lane, d]

    return attend_chunk


def _attending(compiler: Compiler, dim: int) -> Any:
    """The function that attends for 16 rows of queries over one block."""
    score_bytes, added_bytes = BLOCK * LANES * 4, dim * LANES * 4
    tall, high = BLOCK // LANES, 4 if dim % 64 == 0 else 2  # number of tiles that are multiplied at a time

    @compiler.inline
    def attend(queries_at, masks, own_at, before_at, scaling, keys_at, values_at, sums_at, highest_at, totals_at):
        """Update sums `[dim, 16]`, maxima and totals."""
        scores_at, weights_at = stack_memory(score_bytes), stack_memory(score_bytes)
        scales_at, added_at = stack_memory(64), stack_memory(added_bytes)
        multiply_tiles(tall, 1, keys_at, dim * 2, queries_at, dim // TILE_COLUMNS, scores_at)
        if masks:
            mask_columns(scores_at, scaling, own_at, before_at)
            scaling = np.float32(1)
        weigh_columns(scores_at, scaling, highest_at, totals_at, scales_at, weights_at)
        for d in range(0, dim, high * LANES):
            at, into = values_at + d * BLOCK * 2, added_at + d * LANES * 4
            multiply_tiles(high, 2, at, BLOCK * 2, weights_at, BLOCK // TILE_COLUMNS, into)
        add_columns(sums_at, scales_at, added_at, dim)

    return attend
