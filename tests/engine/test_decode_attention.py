"""Decoding by the kernel sees each sequence's window of what it has filled, from any thread."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import torch

from server.core import ModelSpec
from server.engine.attention import AttentionRules
from server.engine.decode_attention import POSITIONS_FOR_THREADS, DecodeAttention
from server.engine.kernels import Kernels
from server.engine.kv_cache import KVCache, Slot
from server.engine.layout import CachedRows, Span
from tests.engine.pool import Pool

KV_HEADS, GROUP, DIM = 2, 3, 64
LAYERS = 2


def cache(dtype: torch.dtype) -> KVCache:
    """Poisoned all over."""
    name = str(dtype).removeprefix("torch.")
    spec = ModelSpec("m", "", GROUP * KV_HEADS * DIM, LAYERS, KV_HEADS, DIM, 300, 512, name, "cpu")
    kv_cache = KVCache(spec, num_slabs=8)
    kv_cache.states.fill_(float("nan"))
    kv_cache.states[:, :, ::2] = float("inf")
    return kv_cache


def fill(kv_cache: KVCache, layer: int, starts: list[int], lengths: list[int], seed: int = 0) -> Pool:
    """Random rows in one layer."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = kv_cache.states[layer]
    for start, length in zip(starts, lengths, strict=True):
        for states in (keys, values):
            states[start : start + length] = torch.randn(length, KV_HEADS, DIM, generator=generator)
    ends = np.array(starts, np.int64) + np.array(lengths, np.int64)
    return Pool(keys, values, np.array(starts, np.int64), ends)


def queries(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """`[heads, rows, dim]`, as a layer hands them over: a view of `[rows, heads, dim]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, GROUP * KV_HEADS, DIM, generator=generator).to(dtype).transpose(0, 1)


def decoder(kv_cache: KVCache, kernels: Kernels) -> DecodeAttention:
    decode = DecodeAttention.over(kv_cache, [AttentionRules(0.1)], kernels)
    assert decode is not None
    return decode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 1, 4, 7, 1000])
@pytest.mark.parametrize("long", [False, True])
def test_it_is_attention_over_the_window_of_what_is_filled(
    long: bool, window: int | None, dtype: torch.dtype, kernels: Kernels
) -> None:
    kv_cache = cache(dtype)
    lengths = [1, 300, 6, 512, 7, 8] if long else [1, 30, 6, 200, 7, 8]
    assert (sum(lengths) > POSITIONS_FOR_THREADS) == long
    pool = fill(kv_cache, 1, [7, 1025, 515, 2048, 3000, 4088], lengths)
    if window is not None:  # what lies before a window is as if it were not there
        for start, end in zip(pool.starts, pool.ends, strict=True):
            kv_cache.states[1, :, start : max(start, end - window)] = float("nan")
    query = queries(len(lengths), dtype)
    got = decoder(kv_cache, kernels).attend(1, query, pool.starts, pool.ends, AttentionRules(0.1, window))
    expected = pool.attention(query.transpose(0, 1), 0.1, window)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=5e-6)


def test_a_soft_cap_in_any_layer_leaves_the_work_to_torch(kernels: Kernels) -> None:
    plain, capped = AttentionRules(0.1), AttentionRules(0.1, softcap=5.0)
    kv_cache = cache(torch.float32)
    assert DecodeAttention.over(kv_cache, [plain, capped], kernels) is None
    assert DecodeAttention.over(kv_cache, [plain, plain], kernels) is not None


def test_what_is_written_to_the_cache_later_is_seen(kernels: Kernels) -> None:
    kv_cache = cache(torch.float32)
    decode = decoder(kv_cache, kernels)
    for seed in range(3):
        for layer in range(LAYERS):
            pool = fill(kv_cache, layer, [100], [9], seed=10 * seed + layer)
            got = decode.attend(layer, queries(1), pool.starts, pool.ends, AttentionRules(0.1))
            expected = pool.attention(queries(1).transpose(0, 1), 0.1)
            torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_of_decodes_and_chunks_is_answered_as_without_the_kernel(
    dtype: torch.dtype, window: int | None, kernels: Kernels
) -> None:
    """Slots of two lengths, with holes between them, and chunks of a prefill behind them, one of them of one token."""
    rules = AttentionRules(0.1, window)
    spans = [
        Span(Slot(256, 0), 5, 1),
        Span(Slot(256, 512), 250, 1),
        Span(Slot(512, 1536), 0, 1),
        Span(Slot(512, 2048), 17, 6),
        Span(Slot(512, 3072), 3, 1),
    ]
    tokens = sum(span.count for span in spans)
    key, value = torch.randn(2, KV_HEADS, tokens, DIM, generator=torch.Generator().manual_seed(7)).to(dtype)
    query = queries(tokens, dtype)
    answers = []
    for use_kernel in (False, True):
        kv_cache = cache(dtype)
        kv_cache.states.zero_()  # without the kernel, masked positions are read
        fill(kv_cache, 0, [span.slot.start for span in spans], [span.start + 1 for span in spans])
        layout = CachedRows(kv_cache, spans, decoder(kv_cache, kernels) if use_kernel else None)
        answers.append(layout.attend(0, query, key, value, rules))
    assert answers[1].dtype == dtype
    rtol, atol = (2e-5, 5e-6) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(answers[1], answers[0], rtol=rtol, atol=atol)


def test_two_threads_at_once_are_both_answered(kernels: Kernels) -> None:
    kv_cache = cache(torch.float32)
    starts, lengths = [3, 1024, 2048], [500, 512, 300]
    pools = [fill(kv_cache, layer, starts, lengths, seed=layer) for layer in range(LAYERS)]
    decode = decoder(kv_cache, kernels)
    together = threading.Barrier(LAYERS)

    def work(layer: int) -> list[torch.Tensor]:
        together.wait()
        pool = pools[layer]
        return [decode.attend(layer, queries(3), pool.starts, pool.ends, AttentionRules(0.1)) for _ in range(50)]

    with ThreadPoolExecutor(LAYERS) as threads:
        answers = list(threads.map(work, range(LAYERS)))
    for pool, got in zip(pools, answers, strict=True):
        expected = pool.attention(queries(3).transpose(0, 1), 0.1)
        torch.testing.assert_close(got[0].double(), expected, rtol=2e-5, atol=5e-6)
        assert all(torch.equal(answer, got[0]) for answer in got)


class RecordedKernels:
    """Kernels that compute nothing, and keep how many threads were asked for and how many ran at once."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.most_at_once = 0
        self._running = 0

    def attend(self, group: int, dim: int, *, threads: int) -> Any:
        self.threads.append(threads)
        return self._kernel

    def _kernel(self, *_: object) -> None:
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        time.sleep(0.01)
        self._running -= 1


def test_the_kernel_runs_once_at_a_time_over_all_caches() -> None:
    """numba's own threads end the process when a second piece of parallel work comes."""
    recorded = RecordedKernels()
    decoders = [decoder(cache(torch.float32), cast(Kernels, recorded)) for _ in range(4)]
    bounds = np.array([0]), np.array([600])

    def work(decode: DecodeAttention) -> None:
        for _ in range(5):
            decode.attend(0, queries(1), *bounds, AttentionRules(0.1))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, decoders))
    assert len(recorded.threads) == 20
    assert recorded.most_at_once == 1


@pytest.mark.parametrize(
    ("positions", "window", "threads"),
    [
        (POSITIONS_FOR_THREADS // 2, None, 1),
        (POSITIONS_FOR_THREADS // 2 + 1, None, 2),
        (POSITIONS_FOR_THREADS, 16, 1),
    ],
)
def test_threads_are_woken_for_much_work_only(positions: int, window: int | None, threads: int) -> None:
    assert torch.get_num_threads() == 2 or pytest.skip("one core")
    recorded = RecordedKernels()
    decode = decoder(cache(torch.float32), cast(Kernels, recorded))
    starts = np.array([0, 1024])
    decode.attend(0, queries(2), starts, starts + positions, AttentionRules(0.1, window))
    assert recorded.threads == [threads]
