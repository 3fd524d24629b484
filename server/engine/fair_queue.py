"""Waiting sequences in queues, one for each task and key: a flood in one queue holds up no other.

A free place goes to the queue with the fewest running sequences. Within a queue, siblings of a request that has begun
go first, because each of them holds a copy of its input. After eight in a row, a request may begin that has fewer
choices than wait before it, so that a request of very many choices does not hold up the small ones after it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from types import MappingProxyType

from server.core import Queue
from server.engine.sequence import Sequence

IN_A_ROW = 8
"""Choices that go on with what has begun, until a request of the same queue may begin before the next one."""

NOBODY: Mapping[Queue, int] = MappingProxyType({})

_Waiting = OrderedDict[Sequence, None]
"""Ordered, and whoever is in the middle of it is found at once."""


def _nobody(sequence: Sequence) -> bool:
    return False


class FairQueue:
    """Queues with equally many running take turns; within a queue, first in, first out, but as said above."""

    def __init__(self) -> None:
        """An empty queue."""
        self._queues: OrderedDict[Queue, _Waiting] = OrderedDict()  # those that have begun are in front
        self._by_request: dict[str, set[Sequence]] = {}
        self._in_a_row: Counter[Queue] = Counter()  # those taken since one that had not begun
        self._length = 0

    def __len__(self) -> int:
        return self._length  # other threads ask as well

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._queues.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its queue."""
        self._queues.setdefault(sequence.request.queue, OrderedDict())[sequence] = None
        self._by_request.setdefault(sequence.request_id, set()).add(sequence)
        self._length += 1

    def add_first(self, sequence: Sequence) -> None:
        """Put a sequence at the head of its queue: it goes on with what has begun already."""
        self.add(sequence)
        self._queues[sequence.request.queue].move_to_end(sequence, last=False)

    def head(
        self,
        held: Container[Queue] = (),
        running: Mapping[Queue, int] = NOBODY,
        is_held: Callable[[Sequence], bool] = _nobody,
    ) -> Sequence | None:
        """The sequence whose turn it is; None if nobody is left.

        Args:
            held: queues to pass over.
            running: how many sequences of each queue run.
            is_held: of a queue's first sequence, whether to pass over the queue.
        """
        best: Sequence | None = None
        fewest = 0
        for queue in self._queues:
            count = running.get(queue, 0)
            if queue in held or (best is not None and count >= fewest):
                continue
            first = self._first(queue)
            if is_held(first):
                continue
            best, fewest = first, count
            if not count:
                break
        return best

    def take(self, sequence: Sequence) -> None:
        """Remove a head; its queue goes to the end of the round."""
        queue = sequence.request.queue
        assert self._first(queue) is sequence, "only the head of a queue is taken"
        self._in_a_row[queue] = 0 if sequence.shared is None else self._in_a_row[queue] + 1
        self._queues.move_to_end(queue)
        self._remove(sequence)

    def remove(self, request_id: str) -> list[Sequence]:
        """Remove what waits of a request, and answer it, in the order of its choices."""
        found = sorted(self._by_request.get(request_id, ()), key=lambda sequence: sequence.index)
        for sequence in found:
            self._remove(sequence)
        return found

    def _remove(self, sequence: Sequence) -> None:
        queue = sequence.request.queue
        del self._queues[queue][sequence]
        if not self._queues[queue]:
            del self._queues[queue], self._in_a_row[queue]
        left = self._by_request[sequence.request_id]
        left.remove(sequence)
        if not left:
            del self._by_request[sequence.request_id]
        self._length -= 1

    def _first(self, queue: Queue) -> Sequence:
        """The next one of a queue: at times the first one that has not begun, if it is small beside what has."""
        waiting = self._queues[queue]
        first = next(iter(waiting))
        if self._in_a_row[queue] < IN_A_ROW:
            return first
        for begun, sequence in enumerate(waiting):
            if sequence.shared is None:
                return sequence if sequence.request.num_choices <= begun else first
        return first
