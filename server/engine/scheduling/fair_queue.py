"""Waiting sequences in queues, one for each task and key: a flood in one queue delays no other.

A free slot goes to the key with the fewest running sequences, and of its queues to the one with the fewest; a key that
uses many tasks gets no more slots than a key that uses one. Requests without a key all count as one key's.

Within a queue, siblings of a request that has started go first, because each of them holds a copy of its input. After
eight siblings in a row, a new request may start if it has no more choices than siblings wait ahead of it, so a request
with very many choices does not delay the small ones after it.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from typing import TypeVar

from server.contracts import Queue
from server.engine.scheduling.sequence import Sequence

IN_A_ROW = 8
"""Number of siblings taken in a row before a new request of the same queue may start ahead of the next one."""

_Waiting = OrderedDict[Sequence, None]
"""Ordered; a member in the middle is found in constant time."""

Name = TypeVar("Name", bound=Hashable)
Queued = TypeVar("Queued")


def _fewest(
    waiting: Iterable[tuple[Name, Queued]],
    running: Counter[Name],
    skipped: Container[Name],
    head_of: Callable[[Name, Queued], Sequence | None],
) -> Sequence | None:
    """The head of the queue or key with the fewest running sequences, the first of equals; None if none has a head."""
    best: Sequence | None = None
    fewest = sys.maxsize
    for name, queued in waiting:
        count = running[name]
        if count >= fewest or name in skipped or (first := head_of(name, queued)) is None:
            continue
        best, fewest = first, count
        if not count:
            break
    return best


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
        """Queues that run their share: the capacity is divided equally among keys, and a key's among its queues."""
        if not self.by_key:
            return set()
        queues = Counter(key for _, key in self.by_queue)
        of_key = capacity // len(self.by_key)
        return {queue for queue, count in self.by_queue.items() if count >= of_key // queues[queue[1]]}

    def keys_at_share(self, capacity: int) -> set[str | None]:
        """Keys that run their equal share of the capacity; never None, which stands for requests without a key."""
        return {key for key, count in self.by_key.items() if key is not None and count >= capacity // len(self.by_key)}


class FairQueue:
    """Queues by API key and task; keys with equally many running sequences take turns, and so do a key's queues."""

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
        must_skip: Callable[[Sequence], bool] | None = None,
    ) -> Sequence | None:
        """The sequence whose turn it is; None if none is left.

        A queue is passed over if it or its key is skipped, or if `must_skip` is true of its first sequence.
        """
        now = running or Running()

        def of_queue(queue: Queue, waiting: _Waiting) -> Sequence | None:
            first = self._first(queue, waiting)
            return None if must_skip is not None and must_skip(first) else first

        def of_key(_: str | None, queues: OrderedDict[Queue, _Waiting]) -> Sequence | None:
            return _fewest(queues.items(), now.by_queue, skipped_queues, of_queue)

        return _fewest(self._keys.items(), now.by_key, skipped_keys, of_key)

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
        """The next sequence of a queue: the first, or the one that may start after `IN_A_ROW` siblings."""
        first = next(iter(waiting))
        if self._in_a_row[queue] < IN_A_ROW:
            return first
        for begun, sequence in enumerate(waiting):
            if sequence.shared is None:
                return sequence if sequence.request.num_choices <= begun else first
        return first
