"""The rows of a step: shuffled by seed, long ones with others of their length, determined by the step's number alone.

A resumed run therefore reads the same rows, and a checkpoint need not store the order.
"""

from collections.abc import Sequence

import torch

MOST_BUCKETED = 8
"""Batches that are sorted by length together: attention pads rows to the longest of a batch."""
LONG = 128
"""Rows are grouped by length only from this mean length on. Below it, attention takes only a few percent of a step; and
because labels often differ in length, grouping would produce batches of one label, which train worse than mixed
ones."""


class Batches:
    """An endless sequence of batches; every row is used once before any row is used again."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Rows are known by their lengths; a batch holds `batch_size` of them."""
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        # A bucket is a section of the shuffled order, at most one epoch long; otherwise the two copies of a row would
        # be sorted next to each other into one batch.
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
