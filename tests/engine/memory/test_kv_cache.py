"""Invariant 6: every position of the pool belongs to exactly one slot, and slots return when their owners end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.memory import kv_cache
from server.engine.memory.kv_cache import Computed, KVCache
from server.engine.memory.slots import Slot, SlotAllocator
from server.engine.model.frozen import FrozenModel


def test_a_slot_is_the_shortest_that_holds_the_positions() -> None:
    allocator = SlotAllocator(num_slabs=4, max_model_len=1000)
    assert allocator.slot_lengths == (256, 512, 1024)
    assert [allocator.slot_length(n) for n in (1, 256, 257, 1000)] == [256, 256, 512, 1024]


def test_a_context_shorter_than_the_shortest_slot_gets_one_length() -> None:
    assert SlotAllocator(num_slabs=1, max_model_len=100).slot_lengths == (128,)


def test_slots_of_one_length_are_neighbours() -> None:
    allocator = SlotAllocator(num_slabs=2, max_model_len=1024)
    slots = [allocator.allocate(200) for _ in range(8)]
    assert slots == [Slot(256, 256 * i) for i in range(8)]


def test_a_full_pool_answers_none_and_a_release_makes_room() -> None:
    allocator = SlotAllocator(num_slabs=1, max_model_len=512)
    first, second = allocator.allocate(256), allocator.allocate(100)
    assert first is not None
    assert second is not None
    assert allocator.allocate(1) is None
    allocator.release(first)
    assert allocator.allocate(512) is None, "half a slab is still in use"
    allocator.release(second)
    assert allocator.allocate(512) == Slot(512, 0), "an empty slab takes any length"


def test_a_slot_that_is_released_twice_is_an_error() -> None:
    allocator = SlotAllocator(num_slabs=1, max_model_len=256)
    slot = allocator.allocate(1)
    assert slot is not None
    allocator.release(slot)
    with pytest.raises(KeyError):
        allocator.release(slot)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1024), st.integers(0, 100)), max_size=80))
def test_whatever_comes_and_goes_no_position_is_shared_or_lost(moves: list[tuple[bool, int, int]]) -> None:
    allocator = SlotAllocator(num_slabs=3, max_model_len=1024)
    owned: list[Slot] = []
    for allocate, positions, which in moves:
        if allocate:
            slot = allocator.allocate(positions)
            if slot is not None:
                assert slot.length >= positions
                owned.append(slot)
        elif owned:
            allocator.release(owned.pop(which % len(owned)))
        allocator.check_integrity(owned)
        taken = [p for slot in owned for p in range(slot.start, slot.start + slot.length)]
        assert len(set(taken)) == len(taken)
        assert all(0 <= p < allocator.num_positions for p in taken)
    for slot in owned:
        allocator.release(slot)
    allocator.check_integrity([])
    assert all(allocator.allocate(1024) is not None for _ in range(3)), "an empty pool is whole again"


def test_integrity_sees_a_leak() -> None:
    allocator = SlotAllocator(num_slabs=1, max_model_len=256)
    allocator.allocate(1)
    with pytest.raises(AssertionError, match="leaked"):
        allocator.check_integrity([])


@pytest.mark.parametrize("most_locked", [0, kv_cache.MOST_LOCKED], ids=["by torch", "by Python"])
def test_a_prefix_copied_in_is_copied_out_and_touches_nothing_else(
    most_locked: int, tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "MOST_LOCKED", most_locked)
    cache = KVCache(tiny.spec, num_slabs=2, shortest_slot=32)
    first, second = cache.allocator.allocate(20), cache.allocator.allocate(20)
    assert first is not None
    assert second is not None
    prefix = torch.randn(*cache.states.shape[:2], 7, *cache.states.shape[3:], dtype=torch.float64)
    cache.copy_in(second, Computed(prefix))
    assert torch.equal(cache.copy_out(second, 7).states, prefix)
    untouched = cache.states.clone()
    untouched[:, :, second.start : second.start + 7] = 0
    assert not untouched.any()
    kept = cache.copy_out(second, 7)
    cache.scrub(second)
    assert not cache.states.any()
    assert torch.equal(kept.states, prefix), "what was copied out does not change any more"
