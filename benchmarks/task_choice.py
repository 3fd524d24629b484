"""Draws the task of each request of `tasks.py`."""

from __future__ import annotations

import itertools
import random

ZIPF_EXPONENT = 1.1


class Choice:
    """A distribution of tasks, which are numbered from 1."""

    def __init__(self, name: str, count: int) -> None:
        """Create a distribution (`uniform` or `zipf`) over `count` tasks."""
        exponent = ZIPF_EXPONENT if name == "zipf" else 0.0
        self._tasks = range(1, count + 1)
        self._weights = list(itertools.accumulate(1 / rank**exponent for rank in self._tasks))

    def draw(self, dice: random.Random) -> int:
        """Draw a task."""
        return dice.choices(self._tasks, cum_weights=self._weights)[0]

    def latest(self, capacity: int, dice: random.Random) -> list[int]:
        """The last `capacity` distinct tasks of an endless sequence of requests, the most recent last.

        These are the tasks in an LRU cache. The sequence is drawn from its end backwards.
        """
        if capacity == len(self._tasks):
            return list(self._tasks)
        found: dict[int, None] = {}
        while len(found) < capacity:
            found.setdefault(self.draw(dice))
        return list(reversed(found))
