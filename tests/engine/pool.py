"""A pool of keys and values for tests: rows lie anywhere in it, and all between them is poison."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Pool:
    """Rows of keys and values somewhere in a pool whose other positions hold NaN and infinity."""

    keys: torch.Tensor
    values: torch.Tensor
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def random(cls, lengths: Sequence[int], kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Pool:
        """Rows of these lengths, in any order, with holes of 0 to 5 positions around them."""
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        places = list(range(len(lengths)))
        rng.shuffle(places)
        starts, position = [0] * len(lengths), rng.randrange(6)
        for row in places:
            starts[row] = position
            position += lengths[row] + rng.randrange(6)
        keys = torch.full((position, kv_heads, dim), float("nan"), dtype=dtype)
        keys[::2] = float("inf")
        values = keys.flip(0).clone()
        for start, length in zip(starts, lengths, strict=True):
            for states in (keys, values):
                states[start : start + length] = torch.randn(length, kv_heads, dim, generator=generator)
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        return cls(keys, values, np.array(starts, np.int64), np.array(ends, np.int64))

    def attention(self, query: torch.Tensor, scaling: float, window: int | None = None) -> torch.Tensor:
        """Attention written out in float64: `query` `[rows, heads, dim]`, answers the same."""
        kv_heads = self.keys.shape[1]
        out = torch.empty(query.shape, dtype=torch.float64)
        for row, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
            first = start if window is None else max(start, end - window)
            keys, values = self.keys[first:end].double(), self.values[first:end].double()
            for head in range(query.shape[1]):
                kv_head = head // (query.shape[1] // kv_heads)
                weights = (keys[:, kv_head] @ query[row, head].double() * scaling).softmax(0)
                out[row, head] = weights @ values[:, kv_head]
        return out
