"""Slots: the positions of the pool that a sequence owns, from its admission to its end.

A slot is contiguous, and long enough for everything that its sequence may need (virtual tokens, input, new tokens), so
no sequence is ever preempted. Slots come in lengths 256, 512, … up to the longest context. The pool is cut into slabs
of that longest length, and all slots of a slab have one length, until the slab is empty again; this way any mix of
lengths shares the memory, and neighbouring slots of one length are read as a batch without gathering.

    pool      |----------- slab 0 -----------|----------- slab 1 -----------|--- slab 2 …
    slots     | 256 | 256 |     |     | …    |    512     |            | …  |   free
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

SHORTEST_SLOT = 256


class Slot(NamedTuple):
    """A contiguous run of positions in the pool, owned by one sequence."""

    length: int
    start: int


@dataclass
class _Slab:
    """One slab in use: the length of its slots, and which of them are free (a heap of starts)."""

    slot_length: int
    free: list[int] = field(default_factory=list)


class SlotAllocator:
    """Hands out slots and takes them back; pure Python, the same on every device."""

    def __init__(self, num_slabs: int, max_model_len: int, shortest: int = SHORTEST_SLOT) -> None:
        """Cut a pool into slabs that each hold at least `max_model_len` positions."""
        lengths = [min(shortest, 1 << (max_model_len - 1).bit_length())]
        while lengths[-1] < max_model_len:
            lengths.append(lengths[-1] * 2)
        self.slot_lengths = tuple(lengths)
        self.slab_length = lengths[-1]
        self.num_slabs = num_slabs
        self._free_slabs = list(range(num_slabs))  # a heap: low slabs first, so that slots lie close together
        self._slabs: dict[int, _Slab] = {}
        self._used: set[Slot] = set()

    @property
    def num_positions(self) -> int:
        """Positions of the whole pool."""
        return self.num_slabs * self.slab_length

    @property
    def used(self) -> frozenset[Slot]:
        """Slots that are handed out."""
        return frozenset(self._used)

    def slot_length(self, positions: int) -> int:
        """The shortest slot that holds this many positions, at most `max_model_len`."""
        return next(length for length in self.slot_lengths if length >= positions)

    def can_allocate(self, positions: int) -> bool:
        """True if `allocate` would return a slot."""
        return bool(self._free_slabs) or self._slab_with_room(self.slot_length(positions)) is not None

    def allocate(self, positions: int) -> Slot | None:
        """A slot for this many positions, or None if there is no room now."""
        length = self.slot_length(positions)
        index = self._slab_with_room(length)
        if index is None:
            if not self._free_slabs:
                return None
            index = heapq.heappop(self._free_slabs)
            first = index * self.slab_length
            self._slabs[index] = _Slab(length, list(range(first, first + self.slab_length, length)))
        slot = Slot(length, heapq.heappop(self._slabs[index].free))
        self._used.add(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """Take a slot back; a slab whose slots are all free can take another length."""
        self._used.remove(slot)
        index = slot.start // self.slab_length
        slab = self._slabs[index]
        heapq.heappush(slab.free, slot.start)
        if len(slab.free) * slab.slot_length == self.slab_length:
            del self._slabs[index]
            heapq.heappush(self._free_slabs, index)

    def check_integrity(self, owned: Iterable[Slot]) -> None:
        """Assert that exactly `owned` is handed out and that every position is accounted for exactly once."""
        owned = list(owned)
        assert len(set(owned)) == len(owned), "two sequences share a slot"
        assert set(owned) == self._used, f"slots leaked or lost: {set(owned) ^ self._used}"
        assert sorted([*self._free_slabs, *self._slabs]) == list(range(self.num_slabs)), "a slab is lost or doubled"
        for index, slab in self._slabs.items():
            used = [slot.start for slot in self._used if slot.start // self.slab_length == index]
            first = index * self.slab_length
            assert sorted([*used, *slab.free]) == list(range(first, first + self.slab_length, slab.slot_length))

    def _slab_with_room(self, length: int) -> int | None:
        rooms = (index for index, slab in self._slabs.items() if slab.slot_length == length and slab.free)
        return min(rooms, default=None)
