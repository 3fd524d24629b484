"""Waiting sequences, the next one from the task of which the fewest run: a flood on one does not hold up another.

Within a task those go first that go on with what has begun, because each holds what was computed for it. Of a request
with very many choices that would make all others of its task wait, so after some of them one goes in between that has
fewer choices than are left: what is small is not held up, and what is as large comes later, as it came later.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType

from server.engine.sequence import Sequence

IN_A_ROW = 8
"""Choices that go on with what has begun, until a request of the same task may begin before the next one."""

NOBODY: Mapping[str | None, int] = MappingProxyType({})


class FairQueue:
    """Between tasks that have equally many running, in turn; within a task first in, first out, but as said above."""

    def __init__(self) -> None:
        """An empty queue."""
        self._queues: OrderedDict[str | None, deque[Sequence]] = OrderedDict()  # those that have begun are in front
        self._in_a_row: Counter[str | None] = Counter()  # task -> those taken since one that had not begun

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))  # in one go, as other threads ask as well

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._queues.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its task's queue."""
        self._queues.setdefault(sequence.request.task, deque()).append(sequence)

    def add_first(self, sequence: Sequence) -> None:
        """Put a sequence at the head of its task's queue: it goes on with what has begun already."""
        self._queues.setdefault(sequence.request.task, deque()).appendleft(sequence)

    def head(self, held: Container[str | None] = (), running: Mapping[str | None, int] = NOBODY) -> Sequence | None:
        """The sequence whose turn it is; None if nobody is left.

        Args:
            held: tasks to pass over.
            running: how many sequences of each task run.
        """
        best: deque[Sequence] | None = None
        fewest = 0
        for task, queue in self._queues.items():
            count = running.get(task, 0)
            if task not in held and (best is None or count < fewest):
                best, fewest = queue, count
                if not count:
                    break
        return None if best is None else self._first(best)

    def take(self, sequence: Sequence) -> None:
        """Remove a head; its task goes to the end of the round."""
        task = sequence.request.task
        queue = self._queues[task]
        assert self._first(queue) is sequence, "only the head of a queue is taken"
        queue.remove(sequence)
        self._in_a_row[task] = 0 if sequence.shared is None else self._in_a_row[task] + 1
        self._queues.move_to_end(task)
        self._forget_if_empty(task)

    def remove(self, request_id: str) -> list[Sequence]:
        """Remove what waits of a request, and answer it."""
        found = [sequence for sequence in self if sequence.request_id == request_id]
        for sequence in found:
            task = sequence.request.task
            self._queues[task].remove(sequence)
            self._forget_if_empty(task)
        return found

    def _first(self, queue: deque[Sequence]) -> Sequence:
        """The next one of a task: at times the first one that has not begun, if it is small beside what has."""
        if self._in_a_row[queue[0].request.task] < IN_A_ROW:
            return queue[0]
        for begun, sequence in enumerate(queue):
            if sequence.shared is None:
                return sequence if sequence.request.num_choices <= begun else queue[0]
        return queue[0]

    def _forget_if_empty(self, task: str | None) -> None:
        if not self._queues[task]:
            del self._queues[task], self._in_a_row[task]
