"""The tokens that a sequence has seen, and the penalty of each, as arrays that grow in place."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class SeenTokens:
    """Distinct token ids in the order of their first occurrence.

    Attributes:
        ids: `[distinct]` int64.
        minus: `[distinct]` float64, the amount to subtract from each token's logit: the presence penalty if the token
            was generated, plus the frequency penalty times the number of times that it was generated.
    """

    def __init__(self, given: Iterable[int] = (), presence: float = 0.0, frequency: float = 0.0) -> None:
        """Start with given tokens, which count as seen but not as generated."""
        self._presence, self._frequency = presence, frequency
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(given))}
        self._counts = [0] * len(self._places)
        self._ids = np.array([*self._places, *[0] * 16], dtype=np.int64)
        self._minus = np.zeros(len(self._ids))
        self._lowest, self._highest = min(self._places, default=0), max(self._places, default=0)
        self._cut()

    def add(self, token_id: int) -> None:
        """Add a generated token."""
        place = self._places.get(token_id)
        if place is None:
            place = self._begin(token_id)
        count = self._counts[place] = self._counts[place] + 1
        self._minus[place] = self._presence + self._frequency * count

    def are_within(self, vocab_size: int) -> bool:
        """Whether all ids are within this vocabulary size."""
        return self._lowest >= 0 and self._highest < vocab_size

    def _begin(self, token_id: int) -> int:
        """Add a token that was not seen before; returns its index."""
        place = self._places[token_id] = len(self._places)
        self._counts.append(0)
        self._lowest, self._highest = min(self._lowest, token_id), max(self._highest, token_id)
        if place == len(self._ids):
            self._ids, self._minus = np.resize(self._ids, 2 * place), np.resize(self._minus, 2 * place)
        self._ids[place] = token_id
        self._cut()
        return place

    def _cut(self) -> None:
        # Computed here, not at each step's read, because most tokens of a text have been seen before.
        distinct = len(self._places)
        self.ids, self.minus = self._ids[:distinct], self._minus[:distinct]
