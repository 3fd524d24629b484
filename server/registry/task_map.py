"""An immutable map from names to tasks whose changed copy costs the same for ten tasks and for a million.

Names are spread over parts by their hash. A copy with changes shares all parts but those that the changes touch. Names
in order, which lists need, are sorted when they are first asked for; copies reuse them, and insert what has come since.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.registry.state import TaskState

PARTS = 1024
MOST_MOVED = 64
"""Names that came or went since names were sorted; with more, the change brings them in order, and no list has to."""
MOST_INSERTED = 256
"""Names that are inserted one by one, each of which moves half of the others."""


class TaskMap(Mapping[str, "TaskState"]):
    """Tasks by name; iteration has no order, `names` is sorted."""

    __slots__ = ("_length", "_order", "_parts")

    def __init__(
        self,
        parts: tuple[dict[str, TaskState], ...] = ({},) * PARTS,
        order: tuple[Sequence[str], frozenset[str]] | None = None,
    ) -> None:
        """Use these parts, which nobody changes any more.

        `order` has the sorted names of an earlier map, and the names that have come or gone since.
        """
        self._parts = parts
        self._length = sum(map(len, parts))
        self._order = order

    def replaced(self, changes: Iterable[tuple[str, TaskState | None]]) -> TaskMap:
        """A copy in which these names have these tasks, or none."""
        order = self._order  # read once: another thread may sort the names meanwhile
        parts, copied = list(self._parts), set[int]()
        moved = set[str]() if order is None else set(order[1])
        for name, task in changes:
            number = hash(name) % PARTS
            if number not in copied:
                copied.add(number)
                parts[number] = dict(parts[number])
            if (task is None) == (name in parts[number]):
                moved.add(name)
            if task is None:
                parts[number].pop(name, None)
            else:
                parts[number][name] = task
        if order is None:
            return TaskMap(tuple(parts))
        changed = TaskMap(tuple(parts), (order[0], frozenset(moved)))
        if len(moved) > MOST_MOVED:
            changed.names  # noqa: B018 - puts them in order
        return changed

    @property
    def names(self) -> Sequence[str]:
        """All names in order; must not be changed."""
        order = self._order
        if order is None:
            names = sorted(self)
        elif not order[1]:
            return order[0]
        elif len(order[1]) > MOST_INSERTED:
            names = [name for name in order[0] if name not in order[1]]
            names += sorted(name for name in order[1] if name in self)
            names.sort()  # two sorted runs, which it merges
        else:
            names = list(order[0])
            for name in order[1]:
                at = bisect_left(names, name)
                is_listed = at < len(names) and names[at] == name
                if name in self and not is_listed:
                    insort(names, name)
                elif name not in self and is_listed:
                    del names[at]
        self._order = names, frozenset()
        return names

    def __getitem__(self, name: str) -> TaskState:
        return self._parts[hash(name) % PARTS][name]

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            yield from part

    def __len__(self) -> int:
        return self._length
