"""Waiting sequences, the next one from the task of which the fewest run: a flood on one does not hold up another.

Within a task those go first that go on with what has begun, because each holds what was computed for it. Of a request
with very many choices that would make all others of its task wait, so after some of them one goes in between that has
fewer choices than are left: what is small is not held up, and what is as large comes later, as it came later.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from types import MappingProxyType

from server.engine.sequence import Sequence

IN_A_ROW = 8
"""Choices that go on with what has begun, until a request of the same task may begin before the next one."""

NOBODY: Mapping[str | None, int] = MappingProxyType({})

_Queue = OrderedDict[Sequence, None]
"""Ordered, and whoever is in the middle of it is found at once."""


def _nobody(sequence: Sequence) -> bool:
    return False


class FairQueue:
    """Between tasks that have equally many running, in turn; within a task first in, first out, but as said above."""

    def __init__(self) -> None:
        """An empty queue."""
        self._queues: OrderedDict[str | None, _Queue] = OrderedDict()  # those that have begun are in front
        self._by_request: dict[str, set[Sequence]] = {}
        self._in_a_row: Counter[str | None] = Counter()  # task -> those taken since one that had not begun
        self._length = 0

    def __len__(self) -> int:
        return self._length  # other threads ask as well

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._queues.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its task's queue."""
        self._queues.setdefault(sequence.request.task, OrderedDict())[sequence] = None
        self._by_request.setdefault(sequence.request_id, set()).add(sequence)
        self._length += 1

    def add_first(self, sequence: Sequence) -> None:
        """Put a sequence at the head of its task's queue: it goes on with what has begun already."""
        self.add(sequence)
        self._queues[sequence.request.task].move_to_end(sequence, last=False)

    def head(
        self,
        held: Container[str | None] = (),
        running: Mapping[str | None, int] = NOBODY,
        is_held: Callable[[Sequence], bool] = _nobody,
    ) -> Sequence | None:
        """The sequence whose turn it is; None if nobody is left.

        Args:
            held: tasks to pass over.
            running: how many sequences of each task run.
            is_held: of a task's first sequence, whether to pass over the task.
        """
        best: Sequence | None = None
        fewest = 0
        for task, queue in self._queues.items():
            count = running.get(task, 0)
            if task in held or (best is not None and count >= fewest):
                continue
            first = self._first(task, queue)
            if is_held(first):
                continue
            best, fewest = first, count
            if not count:
                break
        return best

    def take(self, sequence: Sequence) -> None:
        """Remove a head; its task goes to the end of the round."""
        task = sequence.request.task
        queue = self._queues[task]
        assert self._first(task, queue) is sequence, "only the head of a queue is taken"
        self._in_a_row[task] = 0 if sequence.shared is None else self._in_a_row[task] + 1
        self._queues.move_to_end(task)
        self._remove(sequence)

    def remove(self, request_id: str) -> list[Sequence]:
        """Remove what waits of a request, and answer it, in the order of its choices."""
        found = sorted(self._by_request.get(request_id, ()), key=lambda sequence: sequence.index)
        for sequence in found:
            self._remove(sequence)
        return found

    def _remove(self, sequence: Sequence) -> None:
        task = sequence.request.task
        del self._queues[task][sequence]
        if not self._queues[task]:
            del self._queues[task], self._in_a_row[task]
        left = self._by_request[sequence.request_id]
        left.remove(sequence)
        if not left:
            del self._by_request[sequence.request_id]
        self._length -= 1

    def _first(self, task: str | None, queue: _Queue) -> Sequence:
        """The next one of a task: at times the first one that has not begun, if it is small beside what has."""
        first = next(iter(queue))
        if self._in_a_row[task] < IN_A_ROW:
            return first
        for begun, sequence in enumerate(queue):
            if sequence.shared is None:
                return sequence if sequence.request.num_choices <= begun else first
        return first
