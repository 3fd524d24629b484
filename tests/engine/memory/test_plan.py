"""A plan counts everything that a server takes of a device's memory, and is refused with a remedy where it is too much.

The parts that a plan promises must fit a real allocator, which rounds and keeps fragments: `allocator.py` is its model.
"""

from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine import build_engine
from server.engine.memory.plan import MemoryDemand, MemoryPlan, MiB, Steps, plan
from server.engine.model.frozen import FrozenModel
from server.engine.model.preflight import free_memory
from server.errors import InsufficientMemory
from server.settings import Settings
from tests.engine.allocator import Allocator, Block

GiB = 1024 * MiB

SIZES = st.integers(0, 8 * GiB)
STEPS = st.builds(Steps, largest=SIZES, graphs=st.integers(0, GiB), arriving=st.integers(0, GiB))


@st.composite
def wishes(draw: st.DrawFn, *, measured: bool | None = None) -> MemoryDemand:
    """Settings and models of any size."""
    length = draw(st.integers(16, 40_000))
    slab_length = 1 << (length - 1).bit_length()
    is_measured = draw(st.booleans()) if measured is None else measured
    return MemoryDemand(
        sequences=draw(st.integers(1, 4096)),
        running=draw(st.integers(1, 5120)),
        state_bytes=draw(st.just(0) | st.integers(1, 2**22)),
        max_model_len=length,
        slab_length=slab_length,
        position_bytes=draw(st.integers(256, 2**20)),
        longest_prefix=draw(st.integers(1, length)),
        batch_tokens=draw(st.integers(16, 8192)),
        kv=draw(st.none() | st.integers(1, 200 * GiB)),
        prefix=draw(st.none() | SIZES),
        steps=draw(STEPS) if is_measured else None,
    )


def planned_or_refused(wanted: MemoryDemand, free: int) -> tuple[MemoryPlan | None, InsufficientMemory | None]:
    try:
        return plan(wanted, free), None
    except InsufficientMemory as exc:
        return None, exc


@given(wanted=wishes(), free=st.integers(0, 160 * GiB))
def test_all_parts_together_fit_what_is_free_or_are_refused_with_a_remedy(wanted: MemoryDemand, free: int) -> None:
    planned, refused = planned_or_refused(wanted, free)
    if planned is None:
        assert refused is not None
        assert "PRELUDE_" in refused.remedy
        return
    parts = [
        planned.num_slabs * wanted.slab,
        wanted.running * wanted.state_bytes,
        planned.prefix_bytes,
        planned.shared_bytes,
    ]
    if wanted.steps is not None:
        parts += [wanted.steps.largest, wanted.steps.graphs, wanted.steps.arriving]
    assert sum(parts) <= planned.total <= free
    assert planned.num_slabs >= 1
    assert planned.shared_bytes >= wanted.slab


@given(wanted=wishes(), free=st.integers(0, 160 * GiB))
def test_the_size_that_a_refusal_names_is_taken(wanted: MemoryDemand, free: int) -> None:
    _, refused = planned_or_refused(wanted, free)
    remedy = "" if refused is None else refused.remedy
    if at_most := re.search(r"PRELUDE_KV_MEMORY to at most ([\d.]+)MiB", remedy):
        plan(MemoryDemand(**{**vars(wanted), "kv": int(float(at_most[1]) * MiB)}), free)
    if at_least := re.search(r"Set it to at least ([\d.]+)MiB", remedy):
        assert int(float(at_least[1]) * MiB) >= wanted.slab  # which may still be too much for the device


@given(wanted=wishes(measured=True), free=st.integers(GiB, 160 * GiB))
def test_what_steps_take_is_taken_off_the_kv_cache(wanted: MemoryDemand, free: int) -> None:
    def slabs(largest: int) -> int:
        steps = Steps(largest, 0, 0)
        try:
            return plan(MemoryDemand(**{**vars(wanted), "kv": None, "steps": steps}), free).num_slabs
        except InsufficientMemory:
            return 0

    assert slabs(2 * GiB) <= slabs(GiB) <= slabs(0)


def test_auto_takes_one_sequence_where_no_more_fit() -> None:
    wanted = MemoryDemand(256, 320, 8192, 8192, 2**17, 512, 8192, steps=Steps(GiB // 2))
    assert plan(wanted, 3 * GiB).num_slabs == 1  # one for it, one for a copy, a quarter for prefixes


def test_a_measured_step_leaves_auto_more_than_half_of_the_device() -> None:
    wanted = MemoryDemand(256, 320, 8192, 8192, 2**17, 512, 8192)
    guessed = plan(wanted, 100 * GiB)
    measured = plan(MemoryDemand(**{**vars(wanted), "steps": Steps(3 * GiB, GiB, GiB)}), 100 * GiB)
    assert guessed.granted <= 50 * GiB < measured.granted
    assert "largest step: 3,072 MiB" in str(measured)


def test_a_kv_cache_near_the_free_memory_is_refused_once_steps_are_counted() -> None:
    kv = 60 * GiB
    wanted = MemoryDemand(256, 320, 8192, 8192, 2**17, 512, 8192, kv=kv, prefix=GiB)
    assert plan(wanted, 80 * GiB).granted == kv
    steps = Steps(12 * GiB, GiB, GiB)
    with pytest.raises(InsufficientMemory, match=r"a step of 8,192 tokens takes 12,288 MiB") as caught:
        plan(MemoryDemand(**{**vars(wanted), "steps": steps}), 80 * GiB)
    assert "PRELUDE_MAX_BATCH_TOKENS" in caught.value.remedy
    assert "PRELUDE_KV_MEMORY to at most" in caught.value.remedy


LAYERS, HIDDEN, INTERMEDIATE, KV_WIDTH = 32, 4096, 14336, 1024
"""Of Llama 3.1 8B, in numbers of two bytes."""


SQUARE, NARROW, WIDE = 2 * HIDDEN**2, 2 * HIDDEN * KV_WIDTH, 2 * HIDDEN * INTERMEDIATE
SIZES_OF_WEIGHTS = {
    "down": WIDE,
    "gate": WIDE,
    "up": WIDE,
    "key": NARROW,
    "out": SQUARE,
    "query": SQUARE,
    "value": NARROW,
}
"""Of a layer, in the order of their names in the checkpoint, which is the order in which transformers loads them."""


def load_and_fuse(device: Allocator, threads: int = 4) -> None:
    """Take what loading the model by some threads takes, and then what `optimise.py` does.

    Joint weights replace single ones. Those of query, key and value did not lie side by side, so pieces stay free.
    """
    rng = random.Random(0)
    left = [(layer, name) for layer in range(LAYERS) for name in SIZES_OF_WEIGHTS]
    weights: dict[tuple[int, str], Block] = {}
    device.allocate(2 * 2 * 128_256 * HIDDEN)
    while left:
        layer, name = left.pop(rng.randrange(min(threads, len(left))))
        weights[layer, name] = device.allocate(SIZES_OF_WEIGHTS[name])
    for layer in range(LAYERS):
        for names in (("query", "key", "value"), ("gate", "up")):
            device.allocate(sum(SIZES_OF_WEIGHTS[name] for name in names))
            for name in names:
                device.release(weights[layer, name])


@pytest.mark.parametrize("expandable", [False, True])
def test_a_plan_begins_after_what_joining_weights_leaves_behind_has_been_given_back(
    expandable: bool, tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Allocator(24 * GiB, expandable)
    load_and_fuse(device)
    if not expandable:
        assert device.free < 3 * GiB, "the allocator keeps the single weights' memory, which nothing later fits"
    seen = []

    def free_memory(_: torch.device) -> int:
        seen.append(device.free)
        return GiB

    monkeypatch.setattr(build_engine, "release_unused", device.empty_cache)
    monkeypatch.setattr(build_engine, "free_memory", free_memory)
    build_engine.build_engine(Settings(max_sequences=2, max_batch_tokens=32), tiny)
    assert seen[-1] > 8 * GiB


@pytest.mark.parametrize("capacity", [24, 32])
def test_pieces_that_joining_weights_leaves_between_them_are_no_room_for_a_plan(
    capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Allocator(capacity * GiB, expandable=True)
    load_and_fuse(device)
    device.empty_cache()
    assert device.reserved - device.allocated > 512 * MiB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (device.free, device.capacity))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: device.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: device.allocated)
    wanted = MemoryDemand(256, 320, 8192, 8192, 2**17, 512, 2048, steps=Steps(2 * GiB, GiB // 2, 512 * 2**17))
    Server(device, wanted, random.Random(0), free_memory(torch.device("cuda"))).reserve()


class Server:
    """What a server takes of a device after it has begun, in any order, each part within its share of the plan."""

    def __init__(self, device: Allocator, wanted: MemoryDemand, rng: random.Random, free: int | None = None) -> None:
        self._device, self._wanted, self._rng = device, wanted, rng
        self._planned = plan(wanted, device.free if free is None else free)
        assert wanted.steps is not None
        self._steps = wanted.steps
        self._held: dict[str, list[Block]] = {"prefixes": [], "copies": []}
        device.allocate(self._planned.granted + wanted.position_bytes)
        device.allocate(self._steps.graphs)

    def reserve(self) -> None:
        """As `take_all` does."""
        taken = self._planned.prefix_bytes + self._planned.shared_bytes + self._steps.largest + self._steps.arriving
        self._device.empty_cache()
        self._device.release(self._device.allocate(taken))

    def step(self) -> None:
        """A step's tensors, up to the largest step; then a prefix and a copy come, and others go."""
        left = self._steps.largest
        tensors: list[Block] = []
        while left > MiB and len(tensors) < 12:
            size = min(
                left, self._rng.choice([self._steps.largest // 3, self._rng.randint(1, self._steps.largest // 4)])
            )
            tensors.append(self._device.allocate(size))
            left -= tensors[-1].size
            if self._rng.random() < 0.5:
                gone = tensors.pop(self._rng.randrange(len(tensors)))
                left += gone.size
                self._device.release(gone)
        for tensor in tensors:
            self._device.release(tensor)
        position = self._wanted.position_bytes
        self._hold("prefixes", self._planned.prefix_bytes, position * self._rng.randint(1, self._wanted.longest_prefix))
        self._hold("copies", self._planned.shared_bytes, position * self._rng.randint(1, self._wanted.max_model_len))

    def _hold(self, kind: str, budget: int, size: int) -> None:
        held = self._held[kind]
        arriving = self._device.allocate(size) if kind == "prefixes" else None  # room is made once it has arrived
        while held and sum(block.size for block in held) + size > budget:
            self._device.release(held.pop(self._rng.randrange(len(held)) if kind == "copies" else 0))
        held.append(arriving or self._device.allocate(size))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [24, 80, 141])
def test_what_a_plan_promises_fits_the_allocator_whatever_comes_and_goes(capacity: int, seed: int) -> None:
    device = Allocator(capacity * GiB, expandable=True)
    load_and_fuse(device)
    device.empty_cache()
    wanted = MemoryDemand(256, 320, 8192, 8192, 2**17, 512, 2048, steps=Steps(2 * GiB, GiB // 2, 512 * 2**17))
    server = Server(device, wanted, random.Random(seed))
    server.reserve()
    for _ in range(150):
        server.step()
    assert device.reserved <= device.capacity


def test_segments_that_do_not_grow_would_not_hold_what_a_plan_promises() -> None:
    """Which is why `openmp.py` asks for expandable ones."""
    device = Allocator(24 * GiB, expandable=False)
    load_and_fuse(device)
    device.empty_cache()
    wanted = MemoryDemand(256, 320, 8192, 8192, 2**17, 2048, 2048, steps=Steps(2 * GiB, GiB // 2, 2048 * 2**17))
    server = Server(device, wanted, random.Random(0))
    server.reserve()
    with pytest.raises(torch.OutOfMemoryError):  # noqa: PT012
        for _ in range(150):
            server.step()


def test_a_plan_that_forgets_steps_does_not_fit() -> None:
    device = Allocator(24 * GiB, expandable=True)
    load_and_fuse(device)
    device.empty_cache()
    wanted = MemoryDemand(
        256, 320, 8192, 8192, 2**17, 512, 2048, kv=int(device.free * 0.7) // 2**30 * 2**30, prefix=GiB // 4
    )
    planned = plan(wanted, device.free)  # is content
    with pytest.raises(InsufficientMemory):
        plan(MemoryDemand(**{**vars(wanted), "steps": Steps(2 * GiB, GiB // 2)}), device.free)
    for part in (planned.granted, planned.prefix_bytes, planned.shared_bytes, GiB // 2):
        device.allocate(part)
    with pytest.raises(torch.OutOfMemoryError):
        device.allocate(2 * GiB)
