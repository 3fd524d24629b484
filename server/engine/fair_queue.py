"""Waiting sequences, the next one from the task of which the fewest run: a flood on one does not hold up another."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType

from server.engine.sequence import Sequence

NOBODY: Mapping[str | None, int] = MappingProxyType({})


class FairQueue:
    """First in, first out within a task; between tasks that have equally many running, in turn."""

    def __init__(self) -> None:
        """An empty queue."""
        self._queues: OrderedDict[str | None, deque[Sequence]] = OrderedDict()

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
        best: Sequence | None = None
        fewest = 0
        for task, queue in self._queues.items():
            count = running.get(task, 0)
            if task not in held and (best is None or count < fewest):
                best, fewest = queue[0], count
                if not count:
                    break
        return best

    def take(self, sequence: Sequence) -> None:
        """Remove a head; its task goes to the end of the round."""
        task = sequence.request.task
        queue = self._queues[task]
        assert queue[0] is sequence, "only the head of a queue is taken"
        queue.popleft()
        self._queues.move_to_end(task)
        if not queue:
            del self._queues[task]

    def remove(self, request_id: str) -> list[Sequence]:
        """Remove what waits of a request, and answer it."""
        found = [sequence for sequence in self if sequence.request_id == request_id]
        for sequence in found:
            task = sequence.request.task
            self._queues[task].remove(sequence)
            if not self._queues[task]:
                del self._queues[task]
        return found
