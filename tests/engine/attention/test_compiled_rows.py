"""Compiled attention is attention: of each sequence over its own keys and values, and over nothing else."""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.attention.compiled_rows import CompiledAttention, CompiledRows
from server.engine.attention.interface import AttentionRules
from server.engine.kernels.library import Kernels
from server.engine.kernels.units import BLOCK
from tests.engine.attention.heads import ALL_HEADS
from tests.engine.pool import INF, LAYER, NAN, Heads, Pool, Row, assert_attention, attend, hand_over, on_threads, same

FEW_HEADS = ALL_HEADS[:3]
WINDOWS = [None, 1, 2, 63, 64, 65, 1000]
DECODES = [(length - 1, 1) for length in (*range(1, 20), 31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 300)]
CHUNKS = [(start, count) for start in (0, 1, 15, 63, 64, 65, 100) for count in (2, 15, 16, 17, 63, 64, 65)]
CHUNKS += [(0, 200), (128, 128), (250, 3), (0, 3), (190, 2)]


def rows_of(heads: Heads, shares: list[tuple[int, int]], seed: int = 0) -> list[Row]:
    return [Row.random(heads, start, count, 1000 * seed + index) for index, (start, count) in enumerate(shares)]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_step_of_decodes_and_chunks_is_attention_written_out_in_float64(
    window: int | None, heads: Heads, kernels: Kernels
) -> None:
    rules = AttentionRules(0.3, window)
    rows = rows_of(heads, DECODES + CHUNKS)
    for row, got in zip(rows, attend(kernels, heads, rows, rules), strict=True):
        assert_attention(got, row, rules)


@pytest.mark.parametrize("window", [None, 2, 65])
@pytest.mark.parametrize("size", [1.0, 30.0, 200.0])
def test_sinks_take_their_share_of_every_softmax(
    size: float, window: int | None, heads: Heads, kernels: Kernels
) -> None:
    """Whether they are far below the scores, among them or far above."""
    sinks = torch.linspace(-size, size, heads.queries, dtype=torch.float32)
    rules = AttentionRules(0.3, window, sinks=sinks)
    rows = rows_of(heads, DECODES[::3] + CHUNKS[::3])
    for row, got in zip(rows, attend(kernels, heads, rows, rules), strict=True):
        assert_attention(got, row, rules)


@pytest.mark.parametrize("how", ["fused", "plain", "turned"])
@pytest.mark.parametrize("shares", [DECODES, CHUNKS[::5], [(0, 1)], [(70, 1)], [(3, 2)], [(60, 70)]], ids=len)
def test_inputs_may_lie_in_memory_in_any_way(
    shares: list[tuple[int, int]], how: str, heads: Heads, kernels: Kernels
) -> None:
    """Decoding alone, chunks alone, a sequence alone."""
    rows, rules = rows_of(heads, shares), AttentionRules(-0.2)
    for row, got in zip(rows, attend(kernels, heads, rows, rules, how=how), strict=True):
        assert_attention(got, row, rules)


@pytest.mark.parametrize("scaling", [0.0, 300.0])
def test_scores_may_be_flat_or_beyond_a_float32_exponent(scaling: float, heads: Heads, kernels: Kernels) -> None:
    rows, rules = rows_of(heads, [(40, 1), (0, 70), (7, 1)]), AttentionRules(scaling)
    for row, got in zip(rows, attend(kernels, heads, rows, rules), strict=True):
        torch.testing.assert_close(got.double(), row.attention(rules), rtol=1e-2, atol=1e-2 if scaling else 1e-5)


def test_the_maximum_may_come_in_any_block(heads: Heads, kernels: Kernels) -> None:
    """What was summed up before is scaled down to nothing, or what follows weighs nothing."""
    rules = AttentionRules(1.0)
    for place in (0, 63, 64, 130, 199):
        rows = rows_of(heads, [(180, 20), (199, 1)])
        for row in rows:
            row.keys[place] *= 30
        for row, got in zip(rows, attend(kernels, heads, rows, rules), strict=True):
            torch.testing.assert_close(got.double(), row.attention(rules), rtol=1e-2, atol=1e-2)


@settings(deadline=None, max_examples=40)
@given(
    heads=st.sampled_from(FEW_HEADS),
    seed=st.integers(0, 1000),
    shares=st.lists(st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 2, 16, 17, 70])), min_size=2, max_size=6),
    window=st.sampled_from([None, 2, 64]),
    threads=st.sampled_from([1, 2]),
)
def test_neighbours_change_no_bit_of_a_row(
    heads: Heads, seed: int, shares: list[tuple[int, int]], window: int | None, threads: int, kernels: Kernels
) -> None:
    """Nor does their order, nor the place in the pool, nor the number of threads."""
    rows, rules = rows_of(heads, shares, seed), AttentionRules(0.3, window)
    together = attend(kernels, heads, rows, rules, seed=seed)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    other = attend(kernels, heads, [rows[i] for i in order], rules, seed=seed + 1, threads=threads)
    assert same(other, [together[i] for i in order])
    for row, got in zip(rows, together, strict=True):
        assert same(attend(kernels, heads, [row], rules, seed=seed + 2, threads=3 - threads), [got])


@settings(deadline=None, max_examples=40)
@given(
    heads=st.sampled_from(FEW_HEADS),
    shared=st.integers(1, 140),
    ends=st.lists(st.integers(0, 70), min_size=2, max_size=5),
    window=st.sampled_from([None, 2, 64]),
    threads=st.sampled_from([1, 2]),
)
def test_a_shared_prefix_is_read_from_one_slot_and_changes_no_bit(
    heads: Heads, shared: int, ends: list[int], window: int | None, threads: int, kernels: Kernels
) -> None:
    rows, rules = rows_of(heads, [(shared + end, 1) for end in ends]), AttentionRules(0.3, window)
    for row in rows[1:]:
        row.keys[:shared], row.values[:shared] = rows[0].keys[:shared], rows[0].values[:shared]
    expected = attend(kernels, heads, rows, rules)
    pool = Pool(rows, heads)
    for span in pool.spans[1:]:  # whole vectors of the prefix are read nowhere but in the first row's slot
        pool.kv_cache.states[LAYER, :, span.slot.start : span.slot.start + max(0, shared - 16)] = NAN
    spans = [replace(span, prefix=1, prefix_length=shared) for span in pool.spans]
    query, key, value = hand_over(rows, heads, "plain")
    with on_threads(threads):
        out = CompiledRows(CompiledAttention(pool.kv_cache, kernels), spans).attend(LAYER, query, key, value, rules)
    assert same([row[None] for row in out], expected)


@settings(deadline=None, max_examples=40)
@given(
    heads=st.sampled_from(FEW_HEADS),
    cuts=st.sets(st.integers(1, 199), max_size=6),
    window=st.sampled_from([None, 2, 64, 65]),
    seed=st.integers(0, 1000),
)
def test_cutting_a_prefill_into_other_chunks_changes_no_bit(
    heads: Heads, cuts: set[int], window: int | None, seed: int, kernels: Kernels
) -> None:
    """But for a chunk of one token, which is attended as if it decoded."""
    row, rules = Row.random(heads, 0, 200, seed), AttentionRules(0.3, window)
    (whole,) = attend(kernels, heads, [row], rules)
    for start, end in pairwise([0, *sorted(cuts), 200]):
        part = row.part(start, end)
        (got,) = attend(kernels, heads, [part], rules, seed=seed)
        if end - start > 1:
            assert same([got], [whole[start:end]])
        else:
            assert_attention(got, part, rules)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("window", [None, 20])
def test_what_is_not_finite_shows_where_it_is_seen_and_in_no_other_sequence(
    window: int | None, where: str, bad: float, heads: Heads, kernels: Kernels
) -> None:
    """Sequence 1 has it among its new tokens, sequence 2 decodes behind it; the others are as they are without it."""
    rules, number, token, at = AttentionRules(0.3, window), heads.dim - 1, 5, 65
    shares = [(30, 40), (60, 70), (66, 1), (9, 1), (100, 1)]
    clean = attend(kernels, heads, rows_of(heads, shares), rules)
    rows = rows_of(heads, shares)
    kv_head = heads.kv_heads - 1
    own = slice(kv_head * heads.group, heads.queries)
    if where == "query":
        rows[1].query[token, own, number] = bad
    else:
        for row in rows[1:3]:
            (row.keys if where == "key" else row.values)[at, kv_head, number] = bad
    got = attend(kernels, heads, rows, rules)
    assert same(got[3:], clean[3:])
    assert same(got[:1], clean[:1])
    others = [i for i in range(heads.queries) if i < own.start]
    assert same([part[:, others] for part in got], [part[:, others] for part in clean])
    if where == "query":
        assert got[1][token, own].isnan().all()
        assert same(got[2:3], clean[2:3])
        assert same([torch.cat((got[1][:token], got[1][token + 1 :]))], [torch.cat((clean[1][:5], clean[1][6:]))])
        return
    seen = torch.arange(70) >= token
    if window is not None:
        seen &= torch.arange(70) < token + window
    for row, answer, before, sees in zip(rows[1:3], got[1:3], clean[1:3], (seen, torch.tensor([True])), strict=True):
        hit = (~answer.isfinite())[:, own]
        if where == "value":
            assert hit[sees][..., number].all()
            rest = [answer[:, own, :number]], [before[:, own, :number]]
            assert same(*rest), "beside it in a head"
            continue
        assert same([answer[~sees]], [before[~sees]]), "whoever does not see a key"
        upward = (row.query[sees][:, own, number].float() * bad > 0) | (bad != bad)
        assert torch.equal(hit[sees].all(-1), upward), "a score of minus infinity weighs nothing"


@pytest.mark.parametrize("window", [None, 20])
def test_what_is_not_seen_weighs_exactly_nothing(window: int | None, heads: Heads, kernels: Kernels) -> None:
    """The smallest weight there is would show in numbers that are as large as these."""
    rules, share = AttentionRules(0.3, window), (60, 70)
    (expected,) = attend(kernels, heads, [Row.random(heads, *share)], rules)
    for position in (60, 75, 90, 129):
        row = Row.random(heads, *share)
        row.values[position] = 3e38
        (got,) = attend(kernels, heads, [row], rules)
        first = position - share[0]
        assert same([got[:first]], [expected[:first]])
        if window is not None:
            assert same([got[first + window :]], [expected[first + window :]])


@pytest.mark.parametrize("share", [(5, 1), (0, 6)], ids=["decode", "chunk"])
def test_whoever_sees_only_minus_infinity_is_not_finite(share: tuple[int, int], heads: Heads, kernels: Kernels) -> None:
    row = Row.random(heads, *share)
    row.keys[..., 0] = -INF
    row.query.abs_()
    assert not attend(kernels, heads, [row], AttentionRules(0.3))[0].isfinite().any()


@pytest.mark.parametrize("share", [(5, 1), (0, 6), (60, 8)], ids=str)
def test_a_window_of_nothing_has_no_finite_answer(share: tuple[int, int], heads: Heads, kernels: Kernels) -> None:
    """As a mask that hides everything has none."""
    got = attend(kernels, heads, [Row.random(heads, *share)], AttentionRules(0.3, 0))
    assert not got[0].isfinite().any()


@pytest.mark.parametrize("window", [1, 5, 64])
def test_decoding_does_not_read_what_lies_before_its_window(window: int, heads: Heads, kernels: Kernels) -> None:
    row, rules = Row.random(heads, 150, 1), AttentionRules(0.3, window)
    expected = attend(kernels, heads, [row], rules)
    row.keys[: 151 - window] = row.values[: 151 - window] = NAN
    assert same(attend(kernels, heads, [row], rules), expected)


def guarded(states: torch.Tensor, keep: list[Any]) -> torch.Tensor:
    """The same numbers, right before a page of memory that must not be touched."""
    size, page = states.numel() * states.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    keep.append(memory)
    found = torch.frombuffer(memory, dtype=states.dtype, offset=room - size, count=states.numel()).view(states.shape)
    found.copy_(states)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(behind), page, mmap.PROT_READ & 0) == 0
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")
@pytest.mark.parametrize("share", [(0, 1), (16, 1), (64, 1), (69, 1), (0, 70), (60, 5), (120, 8)], ids=str)
def test_nothing_is_read_behind_the_end_of_the_pool_and_of_inputs(
    share: tuple[int, int], heads: Heads, kernels: Kernels
) -> None:
    """Else the process ends here: the pages behind are locked."""
    keep: list[Any] = []
    rows, rules = [Row.random(heads, *share)], AttentionRules(0.3)
    pool = Pool(rows, heads)
    attention = CompiledAttention(pool.kv_cache, kernels)
    keys, values = (guarded(states, keep) for states in pool.kv_cache.states[LAYER])
    attention._layers[LAYER] = keys.data_ptr(), values.data_ptr()
    query, key, value = (guarded(states.contiguous(), keep) for states in hand_over(rows, heads, "plain"))
    out = CompiledRows(attention, pool.spans).attend(LAYER, query, key, value, rules)
    assert_attention(out, rows[0], rules)


@pytest.mark.parametrize("share", [(7, 1), (0, 5), (0, 33)], ids=str)
def test_nothing_is_written_beside_the_answer(
    share: tuple[int, int], heads: Heads, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    around: list[torch.Tensor] = []

    def padded(states: torch.Tensor, *shape: int) -> torch.Tensor:
        around.append(torch.full((50 + int(np.prod(shape)) + 50,), 3.0, dtype=states.dtype))
        return around[0][50:-50].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", padded)
    attend(kernels, heads, [Row.random(heads, *share)], AttentionRules(0.3))
    (memory,) = around
    assert (memory[:50] == 3).all()
    assert (memory[-50:] == 3).all()


def test_a_scratch_grows_and_is_kept_through_steps_of_any_size(kernels: Kernels) -> None:
    heads, rules = ALL_HEADS[0], AttentionRules(0.3)
    shares = [(0, 2), (0, 150), (7, 1), (3, 9), (200, 100), (0, 64)]
    rows = rows_of(heads, shares)
    pool = Pool(rows, heads)
    attention = CompiledAttention(pool.kv_cache, kernels)
    for row, span in zip(rows, pool.spans, strict=True):
        got = CompiledRows(attention, [span]).attend(LAYER, *hand_over([row], heads, "fused"), rules)
        assert_attention(got, row, rules)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_scratch_is_float32_whatever_torchs_default_is(default: torch.dtype, kernels: Kernels) -> None:
    """A model that is loaded meanwhile changes it; half the room would be written beyond."""
    pool = Pool([Row.random(ALL_HEADS[0], 0, 2)], ALL_HEADS[0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        attention = CompiledAttention(pool.kv_cache, kernels)
        turned, plain = attention._scratch_for(3)
    finally:
        torch.set_default_dtype(before)
    assert attention._scratch.dtype == torch.float32
    assert plain - turned == 4 * 3 * ALL_HEADS[0].kv_heads * BLOCK * ALL_HEADS[0].dim
    assert attention._scratch.numel() * 4 == 2 * (plain - turned)


def test_rows_of_padding_attend_to_nothing_and_nothing_is_stored_of_them(kernels: Kernels) -> None:
    heads, rules = ALL_HEADS[1], AttentionRules(0.3)
    rows = [Row.random(heads, 0, 3), Row.random(heads, 5, 1)]
    pool, padded = Pool(rows, heads), Pool(rows, heads)
    given = hand_over(rows, heads, "fused")
    query, key, value = (torch.cat((one, torch.full_like(one[:, :3], float("nan"))), dim=1) for one in given)
    expected = CompiledRows(CompiledAttention(pool.kv_cache, kernels), pool.spans).attend(LAYER, *given, rules)
    layout = CompiledRows(CompiledAttention(padded.kv_cache, kernels), padded.spans, padding=3)
    got = layout.attend(LAYER, query, key, value, rules)
    assert torch.equal(got[:4], expected)
    assert not got[4:].any()
    assert torch.equal(padded.kv_cache.states.nan_to_num(), pool.kv_cache.states.nan_to_num())
    assert layout.position_ids.tolist() == [0, 1, 2, 5, 0, 0, 0]


def test_inputs_that_the_loops_would_misread_never_reach_them(kernels: Kernels) -> None:
    heads, rules = ALL_HEADS[1], AttentionRules(0.3)
    rows = [Row.random(heads, 0, 3)]
    pool = Pool(rows, heads)
    layout = CompiledRows(CompiledAttention(pool.kv_cache, kernels), pool.spans)
    good = hand_over(rows, heads, "fused")
    for place in range(3):
        for change in (torch.Tensor.float, lambda states: states[:, :-1], lambda states: states[..., :-16]):
            query, key, value = (change(states) if i == place else states for i, states in enumerate(good))
            with pytest.raises(AssertionError):
                layout.attend(LAYER, query, key, value, rules)
    fewer_heads = good[0], good[1][:1], good[2][:1]
    with pytest.raises(AssertionError):
        layout.attend(LAYER, *fewer_heads, rules)
    layout.attend(LAYER, *good, rules)
