"""Which tokens a sequence has seen, and how often it has generated each: what penalties read, as arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class SeenTokens:
    """Distinct token ids in the order in which they came first."""

    def __init__(self, given: Iterable[int] = ()) -> None:
        """Start with given tokens, which count as seen but not as generated."""
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(given))}
        self._ids = np.array([*self._places, *[0] * 16], dtype=np.int64)
        self._counts = np.zeros(len(self._ids))
        self._bounds = (min(self._places, default=0), max(self._places, default=0))

    def add(self, token_id: int) -> None:
        """Take a generated token."""
        place = self._places.setdefault(token_id, len(self._places))
        lowest, highest = self._bounds
        self._bounds = (min(lowest, token_id), max(highest, token_id))
        if place == len(self._ids):
            self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._counts[place:] = 0
        self._ids[place] = token_id
        self._counts[place] += 1

    def are_within(self, vocab_size: int) -> bool:
        """Whether a model of this vocabulary has all of them."""
        lowest, highest = self._bounds
        return lowest >= 0 and highest < vocab_size

    @property
    def ids(self) -> np.ndarray:
        """`[distinct]` int64."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """`[distinct]` float64: how often each was generated."""
        return self._counts[: len(self._places)]
