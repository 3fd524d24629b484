"""A model of torch's caching allocator for CUDA (CUDACachingAllocator.cpp), for large tensors.

Sizes are rounded to 512 bytes. Blocks come from segments: of 20 MiB for sizes up to 10 MiB, else of their own size
rounded to 2 MiB. A request takes the smallest free block that holds it, which is split if more than 1 MiB is left.
Neighbours that are free are merged. Only a segment that is free as a whole goes back to the device: by `empty_cache`,
or when a request finds no memory otherwise.

With expandable segments there is one segment, mapped in pages of 20 MiB: free pages go back wherever they lie.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

MiB = 2**20
ROUNDING, PAGE, OWN_SEGMENT, SEGMENT, KEPT_WHOLE = 512, 2 * MiB, 10 * MiB, 20 * MiB, MiB


@dataclass(eq=False)
class Block:
    """Part of a segment."""

    start: int
    size: int
    segment: int
    is_free: bool = True


@dataclass
class Allocator:
    """A device's memory, and what the allocator has taken of it.

    Attributes:
        capacity: bytes of the device.
        expandable: whether segments are expandable.
        reserved: bytes taken from the device.
        allocated: bytes in use, as rounded.
        peak: the most that was ever in use.
    """

    capacity: int
    expandable: bool = False
    reserved: int = 0
    allocated: int = 0
    peak: int = 0
    _segments: dict[int, list[Block]] = field(default_factory=dict)
    _number: int = 0
    _mapped: set[int] = field(default_factory=set)

    @property
    def free(self) -> int:
        """What `mem_get_info` says."""
        return self.capacity - self.reserved

    def allocate(self, size: int) -> Block:
        """A block of at least this size.

        Raises:
            torch.OutOfMemoryError: there is none, and none comes free by giving segments back.
        """
        rounded = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        block = self._best_fit(rounded) or self._from_new_segment(rounded)
        if block is None or not self._map(block.start, rounded):
            raise torch.OutOfMemoryError(f"{rounded / MiB:,.0f} MiB of {(self.capacity - self.allocated) / MiB:,.0f}")
        self._split(block, rounded)
        block.is_free = False
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Take a block back, and merge it with free neighbours."""
        block.is_free = True
        self.allocated -= block.size
        blocks = self._segments[block.segment]
        place = blocks.index(block)
        first = place - 1 if place and blocks[place - 1].is_free else place
        last = place + 1 if place + 1 < len(blocks) and blocks[place + 1].is_free else place
        blocks[first].size = sum(one.size for one in blocks[first : last + 1])
        del blocks[first + 1 : last + 1]

    def empty_cache(self) -> None:
        """Give the device back what is free as a whole."""
        if self.expandable:
            used = {page for block in self._blocks() if not block.is_free for page in _pages(block.start, block.size)}
            self._mapped &= used
            self.reserved = len(self._mapped) * SEGMENT
            return
        for number, blocks in list(self._segments.items()):
            if len(blocks) == 1 and blocks[0].is_free:
                self.reserved -= blocks[0].size
                del self._segments[number]

    def _blocks(self) -> list[Block]:
        return [block for blocks in self._segments.values() for block in blocks]

    def _best_fit(self, size: int) -> Block | None:
        if self.expandable and not self._segments:
            self._segments[0] = [Block(0, 2**60, 0)]
        found = [block for block in self._blocks() if block.is_free and block.size >= size]
        return min(found, key=lambda block: (block.size, block.start), default=None)

    def _from_new_segment(self, size: int) -> Block | None:
        whole = SEGMENT if size < OWN_SEGMENT else -(-size // PAGE) * PAGE
        if self.reserved + whole > self.capacity:
            self.empty_cache()
        if self.reserved + whole > self.capacity:
            return None
        self._number += 1
        block = Block(0, whole, self._number)
        self._segments[self._number] = [block]
        self.reserved += whole
        return block

    def _map(self, start: int, size: int) -> bool:
        """Whether a block's pages are there; only expandable segments have pages that are not."""
        if not self.expandable:
            return True
        missing = _pages(start, size) - self._mapped
        if self.reserved + len(missing) * SEGMENT > self.capacity:
            self.empty_cache()
            missing = _pages(start, size) - self._mapped
        if self.reserved + len(missing) * SEGMENT > self.capacity:
            return False
        self._mapped |= missing
        self.reserved += len(missing) * SEGMENT
        return True

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if rest <= (ROUNDING if self.expandable else KEPT_WHOLE):
            return
        blocks = self._segments[block.segment]
        blocks.insert(blocks.index(block) + 1, Block(block.start + size, rest, block.segment))
        block.size = size


def _pages(start: int, size: int) -> set[int]:
    return set(range(start // SEGMENT, -(-(start + size) // SEGMENT)))
