"""Keys and values: one pool of positions, divided into slots (`slots.py`), one slot per sequence."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from server.contracts import ModelSpec
from server.engine.fast.operators import at_least_float32
from server.engine.memory.slots import SHORTEST_SLOT, Slot, SlotAllocator
from server.engine.memory.state_pool import StatePool, bytes_per_state

MOST_LOCKED = 2**23
"""Largest copy in bytes for which other threads wait."""


class Computed(NamedTuple):
    """A copy of the keys and values (and recurrent state) of a sequence's first positions."""

    states: torch.Tensor  # [layers, 2, n, kv_heads, head_dim]
    recurrent: torch.Tensor | None = None  # [state_width], the state after them, in models that have one
    number: int = 0  # given by the prefix cache: copies of one number have the same bits; 0 if it never was there

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return self.states.nbytes + (0 if self.recurrent is None else self.recurrent.nbytes)

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity; waits for the device."""
        return bool(self.extremes().isfinite().all())

    def extremes(self) -> torch.Tensor:
        """Its smallest and largest numbers, `[n]`, NaN where any number is; takes no memory of its size."""
        parts = [part for part in (self.states, self.recurrent) if part is not None and part.numel()]
        found = [extreme for part in parts for extreme in (part.amin(), part.amax())]
        return torch.stack([at_least_float32(extreme) for extreme in found]) if found else torch.zeros(1)

    def copy(self) -> Computed:
        """The same in memory of its own."""
        return Computed(self.states.clone(), None if self.recurrent is None else self.recurrent.clone())


class KVCache:
    """The pool's tensor and its allocator.

    Attributes:
        states: `[layers, 2, positions, kv_heads, head_dim]`, keys at index 0 and values at 1.
        allocator: allocates slots to sequences.
        scratch: the last position of the pool, which belongs to no slot: padding rows of a batch write their keys and
            values there, and nothing reads them.
        recurrent: the recurrent states of those who own slots, in models that have one.
    """

    def __init__(
        self, model: ModelSpec, num_slabs: int, shortest_slot: int = SHORTEST_SLOT, max_sequences: int | None = None
    ) -> None:
        """Reserve room for `num_slabs` sequences of the longest context; a CPU's pages are touched as they are filled.

        `max_sequences` limits the sequences with a recurrent state; by default, as many as there can be slots.
        """
        self.allocator = SlotAllocator(num_slabs, model.max_model_len, shortest_slot)
        self.scratch = self.allocator.num_positions
        shape = (model.num_kv_layers, 2, self.scratch + 1, model.num_key_value_heads, model.head_dim)
        self.states = _zeros(shape, getattr(torch, model.dtype), torch.device(model.device))
        self.recurrent: StatePool | None = None
        if model.state_width:
            most = self.allocator.num_positions // self.allocator.slot_lengths[0]
            self.recurrent = StatePool(model, most if max_sequences is None else min(max_sequences, most))

    def allocate(self, positions: int) -> Slot | None:
        """A slot for a sequence of `positions` positions, or None if there is no room now."""
        if self.recurrent is None:
            return self.allocator.allocate(positions)
        slot = self.allocator.allocate(positions) if self.recurrent.has_room else None
        if slot is not None:
            self.recurrent.allocate(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """Release a sequence's slot and recurrent state."""
        self.allocator.release(slot)
        if self.recurrent is not None:
            self.recurrent.release(slot)

    def check_integrity(self, owned: Iterable[Slot]) -> None:
        """Assert that exactly `owned` is handed out."""
        owned = list(owned)
        self.allocator.check_integrity(owned)
        if self.recurrent is not None:
            self.recurrent.check_integrity(owned)

    def write(self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store a step's keys and values, `[kv_heads, tokens, head_dim]`, at `[tokens]` positions of the pool."""
        self.states[layer, 0].index_copy_(0, positions, key.transpose(0, 1))
        self.states[layer, 1].index_copy_(0, positions, value.transpose(0, 1))

    def read(self, layer: int, start: int, count: int, stride: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views `[count, kv_heads, length, head_dim]` of the first positions of slots `stride` positions apart."""
        _, _, _, kv_heads, head_dim = self.states.shape
        region = self.states[layer, :, start : start + count * stride]
        slots = region.view(2, count, stride, kv_heads, head_dim)[:, :, :length].transpose(2, 3)
        return slots[0], slots[1]

    def copy_in(self, slot: Slot, prefix: Computed) -> None:
        """Put what is computed of a sequence's first positions at the start of its slot."""
        copy_to(self.states, slot.start, prefix.states)
        if self.recurrent is not None:
            assert prefix.recurrent is not None, "keys and values alone do not say what the state after them is"
            self.recurrent.of(slot).copy_(prefix.recurrent)

    def view(self, slot: Slot, length: int) -> Computed:
        """A slot's first positions, as they lie here; of a recurrent state as it is now."""
        states = self.states[:, :, slot.start : slot.start + length]
        return Computed(states, None if self.recurrent is None else self.recurrent.of(slot))

    def copy_out(self, slot: Slot, length: int) -> Computed:
        """A copy of a slot's first positions, as `copy_in` takes it."""
        return self.view(slot, length).copy()

    def step(self) -> AbstractContextManager[None]:
        """Run a step; see `StatePool.step`. A failed step needs nothing of keys and values: it writes them again."""
        return nullcontext() if self.recurrent is None else self.recurrent.step()

    def scrub(self, slot: Slot) -> None:
        """Zero a slot that may hold NaN or infinity: a masked position has weight 0, but 0 * NaN is NaN."""
        self.states[:, :, slot.start : slot.start + slot.length] = 0


def copy_to(pool: torch.Tensor, start: int, states: torch.Tensor) -> None:
    """Copy `[layers, 2, n, kv_heads, head_dim]` to positions from `start` on of a pool `[layers, 2, positions, …]`.

    A few megabytes on a CPU are copied without releasing Python's lock, which other threads may keep for milliseconds.
    Even a view of a tensor would release it.
    """
    layers, both, n = states.shape[:3]
    if pool.device.type != "cpu" or states.nbytes > MOST_LOCKED or not states.is_contiguous():
        pool[:, :, start : start + n] = states
        return
    assert pool.dtype == states.dtype, "bytes are copied"
    blocks = layers * both
    block, pool_block = states.nbytes // blocks, pool.nbytes // blocks
    offset = start * (block // n) if n else 0
    origin, target = _memory_of(states), _memory_of(pool)
    for i in range(blocks):
        at = i * pool_block + offset
        target[at : at + block] = origin[i * block : (i + 1) * block]


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which must outlive them."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros come from calloc: a page is taken when it is first written; torch.zeros would touch them all now.
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def bytes_per_position(model: ModelSpec) -> int:
    """Bytes of keys and values of one position, over all layers."""
    return model.kv_width * int(getattr(torch, model.dtype).itemsize)


def bytes_of(model: ModelSpec, positions: int) -> int:
    """Bytes that a sequence of `positions` positions takes here: keys, values and its recurrent state."""
    return positions * bytes_per_position(model) + bytes_per_state(model)
