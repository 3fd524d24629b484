"""Attention of decoding sequences on a CPU by the compiled kernel: one query each, over what each has filled."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from server.engine.attention import AttentionRules
from server.engine.kv_cache import KVCache
from server.engine.operators import as_numpy

if TYPE_CHECKING:
    from server.engine.kernels import Kernels

POSITIONS_FOR_THREADS = 512
"""With fewer positions, one thread is done before a second is awake."""

_launching = threading.Lock()
"""numba's own threads take one piece of parallel work at a time, and end the process if they are given two."""


class DecodeAttention:
    """The kernel over one KV cache."""

    def __init__(self, kv_cache: KVCache, kernels: Kernels) -> None:
        """Use `over`, which knows where it cannot be used."""
        self._kernels = kernels
        self._layers = [(layer[0], layer[1]) for layer in as_numpy(kv_cache.states)]

    @classmethod
    def over(cls, kv_cache: KVCache, rules: Sequence[AttentionRules], kernels: Kernels) -> DecodeAttention | None:
        """The kernel over a cache, or None if a layer asks for what it does not do."""
        return None if any(rule.softcap for rule in rules) else cls(kv_cache, kernels)

    def attend(
        self, layer: int, query: torch.Tensor, starts: np.ndarray, ends: np.ndarray, rules: AttentionRules
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            layer: its index.
            query: `[heads, rows, dim]`.
            starts: `[rows]`, where each row's sequence begins in the pool.
            ends: `[rows]`, the pool position behind its last filled one.
            rules: scaling and window.

        Returns:
            `[rows, heads, dim]` in float32.
        """
        keys, values = self._layers[layer]
        if rules.sliding_window is not None:
            starts = np.maximum(starts, ends - rules.sliding_window)
        rows = query.transpose(0, 1).float().contiguous().numpy()
        out = np.empty_like(rows)
        threads = torch.get_num_threads() if int((ends - starts).sum()) > POSITIONS_FOR_THREADS else 1
        with _launching:
            attend = self._kernels.attend(rows.shape[1] // keys.shape[1], rows.shape[2], threads=threads)
            attend(rows, keys, values, starts, ends, np.float32(rules.scaling), out)
        return torch.from_numpy(out)
