"""Which of many tasks each request of `tasks.py` is for."""

from __future__ import annotations

import itertools
import random

ZIPF_EXPONENT = 1.1


class Choice:
    """Which task a request is for, by number from 1."""

    def __init__(self, name: str, count: int) -> None:
        """`uniform` or `zipf`, of so many tasks."""
        exponent = ZIPF_EXPONENT if name == "zipf" else 0.0
        self._tasks = range(1, count + 1)
        self._weights = list(itertools.accumulate(1 / rank**exponent for rank in self._tasks))

    def draw(self, dice: random.Random) -> int:
        """One task."""
        return dice.choices(self._tasks, cum_weights=self._weights)[0]

    def latest(self, capacity: int, dice: random.Random) -> list[int]:
        """The last so many different tasks of an endless row of requests, the one of the last request at the end.

        That is what a cache holds that drops the least recently used. The row is drawn from its end backwards.
        """
        if capacity == len(self._tasks):
            return list(self._tasks)
        found: dict[int, None] = {}
        while len(found) < capacity:
            found.setdefault(self.draw(dice))
        return list(reversed(found))
