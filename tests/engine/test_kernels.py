"""The compiled attention is attention: of each row over its own keys and values, and over nothing else."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels import Kernels
from server.engine.operators import as_numpy
from tests.engine.pool import Pool

DTYPES = [torch.bfloat16, torch.float32]


class Heads(NamedTuple):
    group: int
    dim: int
    kv_heads: int


ALL_HEADS = [Heads(1, 8, 3), Heads(3, 64, 2), Heads(4, 8, 1)]
THREADED = Heads(3, 64, 2)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=ALL_HEADS, ids=str)
def heads(request: pytest.FixtureRequest) -> Heads:
    found: Heads = request.param
    return found


def queries(rows: int, heads: Heads, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(rows, heads.group * heads.kv_heads, heads.dim, generator=generator)


def attend(
    kernels: Kernels, pool: Pool, query: torch.Tensor, heads: Heads, scaling: float, threads: int = 1
) -> torch.Tensor:
    out = torch.full_like(query, float("nan"))
    kernel = kernels.attend(heads.group, heads.dim, threads=threads)
    states = as_numpy(pool.keys), as_numpy(pool.values)
    kernel(query.numpy(), *states, pool.starts, pool.ends, np.float32(scaling), out.numpy())
    return out


@pytest.mark.parametrize("scaling", [0.125, 1.5])
def test_it_is_attention_written_out_in_float64(
    scaling: float, kernels: Kernels, heads: Heads, dtype: torch.dtype
) -> None:
    """At rows of every length around the kernel's steps and some long ones, with flat scores and with steep ones."""
    lengths = [*range(1, 20), 63, 64, 65, 127, 200, 255, 256, 299, 300]
    pool = Pool.random(lengths, heads.kv_heads, heads.dim, dtype)
    query = queries(len(lengths), heads)
    got = attend(kernels, pool, query, heads, scaling)
    torch.testing.assert_close(got.double(), pool.attention(query, scaling), rtol=2e-5, atol=5e-6)


def test_scores_beyond_a_float32_exponent_weigh_nothing_or_everything(kernels: Kernels, dtype: torch.dtype) -> None:
    heads = Heads(1, 8, 3)
    pool = Pool.random([40, 7], heads.kv_heads, heads.dim, dtype)
    query = queries(2, heads)
    got = attend(kernels, pool, query, heads, 300.0)
    torch.testing.assert_close(got.double(), pool.attention(query, 300.0), rtol=1e-3, atol=1e-3)


def test_the_only_position_of_a_row_is_its_answer(kernels: Kernels, heads: Heads, dtype: torch.dtype) -> None:
    pool = Pool.random([1], heads.kv_heads, heads.dim, dtype)
    expected = pool.values[pool.starts[0]].float().repeat_interleave(heads.group, dim=0)
    torch.testing.assert_close(attend(kernels, pool, queries(1, heads), heads, 0.3)[0], expected, rtol=3e-7, atol=0)


def test_threads_work_out_attention_too(kernels: Kernels, dtype: torch.dtype) -> None:
    lengths = random.Random(3).choices(range(1, 301), k=30)
    pool = Pool.random(lengths, THREADED.kv_heads, THREADED.dim, dtype)
    query = queries(len(lengths), THREADED)
    threaded = attend(kernels, pool, query, THREADED, 0.125, threads=2)
    torch.testing.assert_close(threaded.double(), pool.attention(query, 0.125), rtol=2e-5, atol=5e-6)
    assert torch.equal(attend(kernels, pool, query, THREADED, 0.125, threads=2), threaded)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 12),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from(ALL_HEADS),
)
def test_neighbours_change_no_bit_of_a_row(
    rows: int, seed: int, dtype: torch.dtype, heads: Heads, kernels: Kernels
) -> None:
    """Alone and elsewhere in another pool, a row is answered as it is among its neighbours."""
    lengths = random.Random(seed).choices(range(1, 301), k=rows)
    pool = Pool.random(lengths, heads.kv_heads, heads.dim, dtype, seed)
    query = queries(rows, heads, seed)
    together = attend(kernels, pool, query, heads, 0.3)
    for row, length in enumerate(lengths):
        alone = Pool.random([length], heads.kv_heads, heads.dim, dtype, seed + 1)
        for own, theirs in ((alone.keys, pool.keys), (alone.values, pool.values)):
            own[alone.starts[0] : alone.ends[0]] = theirs[pool.starts[row] : pool.ends[row]]
        assert torch.equal(attend(kernels, alone, query[row : row + 1], heads, 0.3)[0], together[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("states", ["keys", "values"])
@pytest.mark.parametrize("offset", [0, 5, 8, 9, 10])
def test_what_is_not_finite_shows_in_its_own_row_and_head_and_nowhere_else(
    offset: int, states: str, bad: float, kernels: Kernels, heads: Heads, dtype: torch.dtype
) -> None:
    """Rows of 11 positions: two rounds of four, and three left over."""
    pool = Pool.random([11, 11, 11], heads.kv_heads, heads.dim, dtype)
    query = queries(3, heads)
    before = attend(kernels, pool, query, heads, 0.3)
    row, kv_head, number = 1, heads.kv_heads - 1, heads.dim - 1
    getattr(pool, states)[pool.starts[row] + offset, kv_head, number] = bad
    after = attend(kernels, pool, query, heads, 0.3)
    hit = torch.zeros(after.shape, dtype=torch.bool)
    own_heads = slice(kv_head * heads.group, (kv_head + 1) * heads.group)
    if states == "values":
        hit[row, own_heads, number] = True
    elif bad != bad:
        hit[row, own_heads] = True
    else:  # a score of minus infinity weighs nothing, one of plus infinity nothing that is a number
        hit[row, own_heads] = (query[row, own_heads, number] * bad > 0)[:, None]
        hidden = ~hit[row, own_heads].all(dim=-1)
        expected = pool.attention(query, 0.3)[row, own_heads][hidden]
        torch.testing.assert_close(after[row, own_heads][hidden].double(), expected, rtol=2e-5, atol=5e-6)
        after[row, own_heads] = torch.where(hidden[:, None], before[row, own_heads], after[row, own_heads])
    assert torch.equal(~after.isfinite(), hit)
    assert torch.equal(after[~hit], before[~hit])


def test_a_row_that_sees_only_minus_infinity_is_not_finite(kernels: Kernels, heads: Heads, dtype: torch.dtype) -> None:
    pool = Pool.random([6], heads.kv_heads, heads.dim, dtype)
    pool.keys[pool.starts[0] : pool.ends[0], :, 0] = float("-inf")
    query = queries(1, heads).abs()
    assert not attend(kernels, pool, query, heads, 0.3).isfinite().any()


def test_a_query_that_is_not_finite_is_answered_so(kernels: Kernels, heads: Heads, dtype: torch.dtype) -> None:
    pool = Pool.random([9, 9], heads.kv_heads, heads.dim, dtype)
    query = queries(2, heads)
    query[0, 0, 3] = float("nan")
    got = attend(kernels, pool, query, heads, 0.3)
    assert got[0, 0].isnan().all()
    assert got[0, 1:].isfinite().all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", ALL_HEADS, ids=str)
def test_threads_change_no_bit(kernels: Kernels, heads: Heads, dtype: torch.dtype) -> None:
    """Or the number of its neighbours, which decides on threads, would change a row's answer."""
    lengths = random.Random(3).choices(range(1, 301), k=30)
    pool = Pool.random(lengths, heads.kv_heads, heads.dim, dtype)
    query = queries(len(lengths), heads)
    serial = attend(kernels, pool, query, heads, 0.125, threads=1)
    assert torch.equal(attend(kernels, pool, query, heads, 0.125, threads=2), serial)
