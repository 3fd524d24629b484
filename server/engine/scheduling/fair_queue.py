"""Waiting sequences in queues, one for each task and key: a flood in one queue delays no other.

A free slot goes to the key with the fewest running sequences, and of its queues to the one with the fewest; a key that
uses many tasks gets no more slots than a key that uses one. Requests without a key all count as one key's.

Within a queue, siblings of a request that has started go first, because each of them holds a copy of its input. After
eight siblings in a row, a new request may start if it has no more choices than siblings wait ahead of it, so a request
with very many choices does not delay the small ones after it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator

from server.contracts import Queue
from server.engine.scheduling.sequence import Sequence

IN_A_ROW = 8
"""Number of siblings taken in a row before a new request of the same queue may start ahead of the next one."""

_Waiting = OrderedDict[Sequence, None]
"""Ordered; a member in the middle is found in constant time."""


def _nobody(sequence: Sequence) -> bool:
    return False


class Running:
    """How many sequences run, by queue and by key."""

    def __init__(self, sequences: Iterable[Sequence] = ()) -> None:
        self.by_queue: Counter[Queue] = Counter(sequence.request.queue for sequence in sequences)
        self.by_key: Counter[str | None] = Counter()
        for (_, key), count in self.by_queue.items():
            self.by_key[key] += count

    def add(self, sequence: Sequence) -> None:
        """Count one more."""
        self.by_queue[sequence.request.queue] += 1
        self.by_key[sequence.request.key_id] += 1

    def queues_at_share(self, capacity: int) -> set[Queue]:
        """Queues that already run their fair share of `capacity`.

        The capacity is divided equally among the keys, and each key's part equally among its queues.
        """
        if not self.by_key:
            return set()
        queues = Counter(key for _, key in self.by_queue)
        of_key = capacity // len(self.by_key)
        return {queue for queue, count in self.by_queue.items() if count >= of_key // queues[queue[1]]}

    def keys_at_share(self, capacity: int) -> set[str | None]:
        """Keys that run their equal share of the capacity; never None, which stands for requests without a key."""
        return {key for key, count in self.by_key.items() if key is not None and count >= capacity // len(self.by_key)}


class FairQueue:
    """Queues by API key and task.

    Keys with equally many running sequences take turns, and so do the queues of one key. Within a queue the order is
    first in, first out, with the exceptions described in the module's docstring.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[str | None, OrderedDict[Queue, _Waiting]] = OrderedDict()
        """Queues by key, in the order of their turns. In each queue, siblings of started requests are in front."""
        self._by_request: dict[str, set[Sequence]] = {}
        self._in_a_row: Counter[Queue] = Counter()  # siblings taken since the last new request, by queue
        self._length = 0

    def __len__(self) -> int:
        return self._length  # other threads ask as well

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queues in self._keys.values() for queue in queues.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its queue."""
        request = sequence.request
        self._keys.setdefault(request.key_id, OrderedDict()).setdefault(request.queue, OrderedDict())[sequence] = None
        self._by_request.setdefault(sequence.request_id, set()).add(sequence)
        self._length += 1

    def add_first(self, sequence: Sequence) -> None:
        """Put a sequence at the head of its queue, because its request has started already."""
        self.add(sequence)
        self._of(sequence).move_to_end(sequence, last=False)

    def head(
        self,
        running: Running | None = None,
        skipped_queues: Container[Queue] = (),
        skipped_keys: Container[str | None] = (),
        must_skip: Callable[[Sequence], bool] = _nobody,
    ) -> Sequence | None:
        """The sequence whose turn it is; None if nobody is left.

        Args:
            running: who runs; nobody by default.
            skipped_queues: queues to pass over.
            skipped_keys: keys to pass over.
            must_skip: predicate on the first sequence of a queue; if true, the queue is passed over.
        """
        running = running or Running()
        best: Sequence | None = None
        fewest = 0
        for key, queues in self._keys.items():
            count = running.by_key[key]
            if key in skipped_keys or (best is not None and count >= fewest):
                continue
            first = self._head_of(queues, running, skipped_queues, must_skip)
            if first is not None:
                best, fewest = first, count
                if not count:
                    break
        return best

    def _head_of(
        self,
        queues: OrderedDict[Queue, _Waiting],
        running: Running,
        skipped_queues: Container[Queue],
        must_skip: Callable[[Sequence], bool],
    ) -> Sequence | None:
        """The head of one key's queues; see `head`."""
        best: Sequence | None = None
        fewest = 0
        for queue, waiting in queues.items():
            count = running.by_queue[queue]
            if queue in skipped_queues or (best is not None and count >= fewest):
                continue
            first = self._first(queue, waiting)
            if must_skip(first):
                continue
            best, fewest = first, count
            if not count:
                break
        return best

    def take(self, sequence: Sequence) -> None:
        """Remove a head; its key goes to the end of the round, and its queue to the end of that key's."""
        queue, key = sequence.request.queue, sequence.request.key_id
        assert self._first(queue, self._of(sequence)) is sequence, "only the head of a queue is taken"
        self._in_a_row[queue] = 0 if sequence.shared is None else self._in_a_row[queue] + 1
        self._keys[key].move_to_end(queue)
        self._keys.move_to_end(key)
        self._remove(sequence)

    def remove(self, request_id: str) -> list[Sequence]:
        """Remove a request's waiting sequences and return them, in the order of its choices."""
        found = sorted(self._by_request.get(request_id, ()), key=lambda sequence: sequence.index)
        for sequence in found:
            self._remove(sequence)
        return found

    def _remove(self, sequence: Sequence) -> None:
        queue, key = sequence.request.queue, sequence.request.key_id
        waiting = self._of(sequence)
        del waiting[sequence]
        if not waiting:
            del self._keys[key][queue], self._in_a_row[queue]
        if not self._keys[key]:
            del self._keys[key]
        left = self._by_request[sequence.request_id]
        left.remove(sequence)
        if not left:
            del self._by_request[sequence.request_id]
        self._length -= 1

    def _of(self, sequence: Sequence) -> _Waiting:
        """The queue that a sequence waits in."""
        return self._keys[sequence.request.key_id][sequence.request.queue]

    def _first(self, queue: Queue, waiting: _Waiting) -> Sequence:
        """The next sequence of a queue: usually the first.

        After `IN_A_ROW` siblings, it is the first sequence of a request that has not started, if that request has no
        more choices than siblings wait before it.
        """
        first = next(iter(waiting))
        if self._in_a_row[queue] < IN_A_ROW:
            return first
        for begun, sequence in enumerate(waiting):
            if sequence.shared is None:
                return sequence if sequence.request.num_choices <= begun else first
        return first
