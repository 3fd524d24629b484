from __future__ import annotations

import pytest
import torch

from server.engine.attention.cached_rows import Span
from server.engine.attention.compiled_rows import POSITIONS_FOR_THREADS, CompiledAttention, CompiledRows
from server.engine.attention.interface import AttentionRules
from server.engine.kernels.attention import COLUMN
from server.engine.kernels.library import Kernels
from server.engine.kernels.units import BLOCK, QUERIES
from server.engine.memory.slots import Slot
from tests.engine.attention.heads import ALL_HEADS
from tests.engine.pool import LAYER, Heads, Pool, Row, hand_over, same


def test_layers_may_differ_in_query_heads(kernels: Kernels) -> None:
    heads, rules = ALL_HEADS[0]._replace(group=2), AttentionRules(0.3)  # as tiny models have; ALL_HEADS[0] is its half
    rows = [Row.random(heads, 0, 20)]
    pool = Pool(rows, heads)
    layout = CompiledRows(CompiledAttention(pool.kv_cache, kernels), pool.spans)
    query, key, value = hand_over(rows, heads, "plain")
    every = layout.attend(LAYER, query, key, value, rules)
    second = layout.attend(LAYER, query[::2], key, value, rules)
    assert same([second], [every[:, ::2]])


def test_what_the_loops_cannot_do_is_left_to_torch(kernels: Kernels) -> None:
    plain, capped = AttentionRules(0.1), AttentionRules(0.1, softcap=5.0)
    heads = Heads(1, 1, 8, torch.float32)
    kv_cache = Pool([Row.random(heads, 0, 1)], heads).kv_cache
    assert CompiledAttention.over(kv_cache, [plain, plain], kernels) is not None
    assert CompiledAttention.over(kv_cache, [plain, capped], kernels) is None
    assert CompiledAttention.over(kv_cache, [plain], None) is None
    odd = heads._replace(dim=10)
    assert CompiledAttention.over(Pool([Row.random(odd, 0, 1)], odd).kv_cache, [plain], kernels) is None


@pytest.mark.parametrize(
    ("shares", "threads"),
    [
        ([(POSITIONS_FOR_THREADS - 1, 1)], 1),
        ([(POSITIONS_FOR_THREADS, 1)], 2),
        ([(9, 1)] * 51, 1),
        ([(9, 1)] * 52, 2),
        ([(0, 2)], 2),
    ],
    ids=str,
)
def test_threads_are_woken_for_much_work_only(
    shares: list[tuple[int, int]], threads: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    heads = ALL_HEADS[1]
    attention = CompiledAttention(Pool([Row.random(heads, 0, 1)], heads).kv_cache, kernels)
    work = attention.plan([Span(Slot(1024, 0), start, count) for start, count in shares])
    assert work.threads == threads


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_unit_of_a_step_is_planned_once(threads: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    heads = ALL_HEADS[1]
    attention = CompiledAttention(Pool([Row.random(heads, 0, 1)], heads).kv_cache, kernels)
    spans = [Span(Slot(1024, 0), 600, 1), Span(Slot(1024, 1024), 60, 70)]
    work = attention.plan(spans)
    blocks, queries = -(-130 // BLOCK), -(-70 // QUERIES)
    assert sorted(map(tuple, work.spread)) == [(1, h, b) for h in range(heads.kv_heads) for b in range(blocks)]
    decoding = [(0, -1, -1)] if threads == 1 else [(0, h, -1) for h in range(heads.kv_heads)]
    prefill = [(1, h, q) for h in range(heads.kv_heads) for q in range(queries)]
    assert sorted(map(tuple, work.attend)) == decoding + prefill
    assert (work.blocks, work.tokens) == (blocks, 71)


def test_prefixes_of_other_numbers_and_of_chunks_are_read_from_their_own_slots(kernels: Kernels) -> None:
    heads = ALL_HEADS[1]
    attention = CompiledAttention(Pool([Row.random(heads, 0, 1)], heads).kv_cache, kernels)
    slots = [Slot(256, 256 * i) for i in range(6)]
    given = [(1, 120, 1), (2, 120, 1), (0, 120, 1), (0, 120, 1), (1, 120, 4), (1, 99, 1)]  # number, start, count
    spans = [Span(slot, start, count, number, 100) for slot, (number, start, count) in zip(slots, given, strict=True)]
    work = attention.plan([*spans, Span(Slot(256, 2000), 130, 1, 2, 100)])
    read = [(int(row[COLUMN.prefix_slot]), int(row[COLUMN.prefix])) for row in work.spans]
    assert read == [*((slot.start, 0) for slot in slots), (256, 100)]
