"""Machine code for what torch does badly on a CPU, made by numba at the start: it needs no C++ compiler.

Two kinds of work are here. Decoding sequences attend: torch wants a batch of equal lengths in neighbouring slots, reads
up to the longest and masks the rest; here every sequence and key head is a piece of work of its own, wherever its slot
lies, so its result cannot depend on any other. And a layer's small work between its matrix products (norm, rotary
embedding, gate), which torch spreads over many operators that each cost some microseconds.

The loops are written to become vector instructions: the innermost ones run over numbers that lie side by side. They
compute in float32, whatever is stored. Not a number stays not a number: who attends to one must notice.
"""

from __future__ import annotations

import ctypes.util
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

REORDERED = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be taken in any order, as a vector unit takes them. Not "fast": that would assume that nothing is NaN."""

POSITIONS_AT_ONCE = 4

_LOG2_E = np.float32(1.4426950408889634)
_LOWEST, _HIGHEST = np.float32(-126.0), np.float32(128.0)  # exponents of a float32; the highest is infinity
_HALF = np.float32(0.5)
# Taylor's series of 2 ** f, which for |f| <= 1/2 is exact to float32's last digits.
_C1, _C2, _C3 = np.float32(0.69314718), np.float32(0.24022651), np.float32(0.05550411)
_C4, _C5, _C6 = np.float32(0.00961813), np.float32(0.00133336), np.float32(0.00015404)


def _widen(number: Any) -> Any:
    """A stored number as float32."""
    raise NotImplementedError("only compiled code calls it")


@overload(_widen, inline="always")
def _widen_compiled(number):  # type: ignore[no-untyped-def]
    if isinstance(number, types.Integer):  # bfloat16 is the upper half of a float32
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: np.float32(number)


def _narrow(number: Any, array: Any) -> Any:
    """A float32 as an array stores it, rounded to the nearest and of two to the even one."""
    raise NotImplementedError("only compiled code calls it")


@overload(_narrow, inline="always")
def _narrow_compiled(number, array):  # type: ignore[no-untyped-def]
    return (
        (lambda number, array: _to_bfloat16(number))
        if isinstance(array.dtype, types.Integer)
        else (lambda number, array: np.float32(number))
    )


@numba.njit(inline="always")
def _to_bfloat16(number: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@numba.njit(inline="always", fastmath=REORDERED)
def _exp(x: Any) -> Any:
    """e ** x, in steps that a vector unit has; NaN stays NaN."""
    t = x * _LOG2_E
    t = max(t, _LOWEST)
    t = min(t, _HIGHEST)
    whole = np.floor(t + _HALF)
    f = t - whole
    fraction = np.float32(1) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return fraction * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


Kernel = Callable[..., None]


@dataclass(frozen=True)
class Kernels:
    """Functions that are compiled by their first call with arrays of some type, or read from a cache.

    Arrays hold float32, or bfloat16 as uint16, and lie in memory without gaps.

    Attributes:
        rms_norm: `x` `[tokens, width]`, `weight` `[width]`, epsilon, `out` `[tokens, width]`.
        rotate: `x` `[tokens, all_heads, dim]`, of which the first so many heads are turned in place, `cos` and `sin`
            `[tokens, dim]` in float32, the first half of `sin` negated.
        silu_gate: `gate_up` `[tokens, 2 * width]`, `out` `[tokens, width]`.
    """

    rms_norm: Kernel
    rotate: Kernel
    silu_gate: Kernel
    _cache: bool

    def attend(self, group: int, dim: int, *, threads: int) -> Kernel:
        """Attention of decoding sequences.

        It takes `query` `[rows, heads, dim]` in float32, `keys` and `values` `[positions, kv_heads, dim]`, `starts` and
        `ends` `[rows]`, the scaling, and `out` like `query`.

        Args:
            group: query heads that share a key head.
            dim: numbers per head; like `group` it is part of the code, so that loops over it need no counter.
            threads: 1 runs it on the caller's.
        """
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        return _attend(group, dim, self._cache)


@functools.cache
def compile_kernels(cache_dir: Path | None) -> Kernels:
    """The kernels, whose machine code is kept in `cache_dir`; None keeps nothing."""
    numba.config.THREADING_LAYER = _threading_layer()  # type: ignore[attr-defined]
    if cache_dir is not None:
        numba.config.CACHE_DIR = str(cache_dir.expanduser())  # type: ignore[attr-defined]
    cache = cache_dir is not None
    jit = numba.njit(fastmath=REORDERED, nogil=True, error_model="numpy", cache=cache)
    return Kernels(jit(_rms_norm), jit(_rotate), jit(_silu_gate), cache)


def _threading_layer() -> str:
    """OpenMP's threads begin at once; numba's own, which sleep between two calls, serve where it is not installed."""
    has_openmp = importlib.util.find_spec("numba.np.ufunc.omppool") and ctypes.util.find_library("gomp")
    return "omp" if has_openmp else "workqueue"


def _rms_norm(x: Any, weight: Any, epsilon: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Zhang and Sennrich 2019. As transformers does it, the normed number is rounded before it is weighed."""
    tokens, width = x.shape
    for t in range(tokens):
        total = np.float32(0)
        for i in range(width):
            number = _widen(x[t, i])
            total += number * number
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
        for i in range(width):
            normed = _widen(_narrow(_widen(x[t, i]) * scale, out))
            out[t, i] = _narrow(normed * _widen(weight[i]), out)


def _rotate(x: Any, cos: Any, sin: Any, num_rotated: Any) -> None:  # pragma: no cover - compiled
    """Su et al. 2021, halves paired as transformers pairs them."""
    tokens, _, dim = x.shape
    half = dim // 2
    for t in range(tokens):
        for h in range(num_rotated):
            for i in range(half):
                first, second = _widen(x[t, h, i]), _widen(x[t, h, half + i])
                x[t, h, i] = _narrow(first * cos[t, i] + second * sin[t, i], x)
                x[t, h, half + i] = _narrow(second * cos[t, half + i] + first * sin[t, half + i], x)


def _silu_gate(gate_up: Any, out: Any) -> None:  # pragma: no cover - compiled
    """silu(gate) * up."""
    tokens, width = out.shape
    for t in range(tokens):
        for i in range(width):
            gate = _widen(gate_up[t, i])
            out[t, i] = _narrow(gate / (np.float32(1) + _exp(-gate)) * _widen(gate_up[t, width + i]), out)


@functools.cache
def _attend(group: int, dim: int, cache: bool) -> Kernel:  # noqa: C901 - one loop nest, on purpose
    @numba.njit(parallel=True, fastmath=REORDERED, nogil=True, error_model="numpy", cache=cache)
    def attend(query, keys, values, starts, ends, scaling, out):  # type: ignore[no-untyped-def]  # noqa: C901
        kv_heads = keys.shape[1]
        for unit in numba.prange(starts.shape[0] * kv_heads):
            row, kv_head = unit // kv_heads, unit % kv_heads
            start, count = starts[row], ends[row] - starts[row]
            queries = query[row, kv_head * group : (kv_head + 1) * group]
            scores = np.empty((group, count), np.float32)
            sums = np.zeros((group, dim), np.float32)
            key = np.empty(dim, np.float32)

            for p in range(count):
                stored = keys[start + p, kv_head]
                for d in range(dim):
                    key[d] = _widen(stored[d])
                for g in range(group):
                    score = np.float32(0)
                    for d in range(dim):
                        score += queries[g, d] * key[d]
                    scores[g, p] = score * scaling

            for g in range(group):
                largest = scores[g, 0]
                for p in range(count):
                    largest = max(largest, scores[g, p])
                total = np.float32(0)
                for p in range(count):
                    weight = _exp(scores[g, p] - largest)
                    scores[g, p] = weight
                    total += weight
                share = np.float32(1) / total
                for p in range(count):
                    scores[g, p] *= share

            whole = count - count % POSITIONS_AT_ONCE
            for p in range(0, whole, POSITIONS_AT_ONCE):
                v0, v1 = values[start + p, kv_head], values[start + p + 1, kv_head]
                v2, v3 = values[start + p + 2, kv_head], values[start + p + 3, kv_head]
                for g in range(group):
                    w0, w1, w2, w3 = scores[g, p], scores[g, p + 1], scores[g, p + 2], scores[g, p + 3]
                    for d in range(dim):
                        sums[g, d] += w0 * _widen(v0[d]) + w1 * _widen(v1[d]) + w2 * _widen(v2[d]) + w3 * _widen(v3[d])
            for p in range(whole, count):
                stored = values[start + p, kv_head]
                for g in range(group):
                    for d in range(dim):
                        sums[g, d] += scores[g, p] * _widen(stored[d])

            for g in range(group):
                for d in range(dim):
                    out[row, kv_head * group + g, d] = sums[g, d]

    return attend
