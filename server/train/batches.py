"""The rows of a step: shuffled by seed, long ones with others of their length, determined by the step's number alone.

So a run that goes on where it was stopped reads what it would have read, and nothing of it has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MOST_BUCKETED = 8
"""Batches that are sorted by length together: attention pads rows to the longest of a batch."""
LONG = 128
"""Mean length from which that is done. Below, attention is a few percent of a step, and length often tells one label
from another: batches of one label each teach worse than mixed ones."""


class Batches:
    """Endless batches of rows that are dealt once before any is dealt again."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Rows are known by their lengths; a batch holds `batch_size` of them."""
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        # A bucket is a stretch of the deal, never longer than the file: sorted, its twins would meet in one batch.
        long = sum(lengths) >= LONG * len(lengths)
        self._bucketed = max(1, min(MOST_BUCKETED, len(lengths) // batch_size)) if long else 1
        self._epochs: dict[int, list[int]] = {}
        self._bucket: tuple[int, list[list[int]]] | None = None

    def at(self, step: int) -> list[int]:
        """Row indices of a step, which counts from 0."""
        number, index = divmod(step, self._bucketed)
        if self._bucket is None or self._bucket[0] != number:
            self._bucket = (number, self._make(number))
        return self._bucket[1][index]

    def _make(self, number: int) -> list[list[int]]:
        size = self._bucketed * self._batch_size
        dealt = [self._dealt(index) for index in range(number * size, (number + 1) * size)]
        ordered = sorted(dealt, key=lambda row: self._lengths[row])
        batches = [ordered[start : start + self._batch_size] for start in range(0, size, self._batch_size)]
        order = torch.randperm(self._bucketed, generator=self._generator(number, 1)).tolist()
        return [batches[index] for index in order]

    def _dealt(self, index: int) -> int:
        epoch, within = divmod(index, len(self._lengths))
        if epoch not in self._epochs:
            shuffled = torch.randperm(len(self._lengths), generator=self._generator(epoch, 0)).tolist()
            self._epochs = {kept: rows for kept, rows in self._epochs.items() if kept >= epoch - 1}
            self._epochs[epoch] = shuffled
        return self._epochs[epoch][within]

    def _generator(self, number: int, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1_000_003 + number * 2 + purpose) % 2**63)
