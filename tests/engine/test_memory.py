"""A plan counts everything that a server takes of a device's memory, and is refused with a remedy where it is too much.

The parts that a plan promises must fit a real allocator, which rounds and keeps fragments: `allocator.py` is its model.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.memory import MemoryPlan, MiB, Steps, Wanted, plan
from server.errors import InsufficientMemory

GiB = 1024 * MiB

SIZES = st.integers(0, 8 * GiB)
STEPS = st.builds(Steps, largest=SIZES, graphs=st.integers(0, GiB), arriving=st.integers(0, GiB))


@st.composite
def wishes(draw: st.DrawFn, *, measured: bool | None = None) -> Wanted:
    """Settings and models of any size."""
    length = draw(st.integers(16, 40_000))
    slab_length = 1 << (length - 1).bit_length()
    is_measured = draw(st.booleans()) if measured is None else measured
    return Wanted(
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


def planned_or_refused(wanted: Wanted, free: int) -> tuple[MemoryPlan | None, InsufficientMemory | None]:
    try:
        return plan(wanted, free), None
    except InsufficientMemory as exc:
        return None, exc


@given(wanted=wishes(), free=st.integers(0, 160 * GiB))
def test_all_parts_together_fit_what_is_free_or_are_refused_with_a_remedy(wanted: Wanted, free: int) -> None:
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
def test_the_size_that_a_refusal_names_is_taken(wanted: Wanted, free: int) -> None:
    _, refused = planned_or_refused(wanted, free)
    remedy = "" if refused is None else refused.remedy
    if at_most := re.search(r"PRELUDE_KV_MEMORY to at most ([\d.]+)MiB", remedy):
        plan(Wanted(**{**vars(wanted), "kv": int(float(at_most[1]) * MiB)}), free)
    if at_least := re.search(r"Set it to at least ([\d.]+)MiB", remedy):
        assert int(float(at_least[1]) * MiB) >= wanted.slab  # which may still be too much for the device


@given(wanted=wishes(measured=True), free=st.integers(GiB, 160 * GiB))
def test_what_steps_take_is_taken_off_the_kv_cache(wanted: Wanted, free: int) -> None:
    def slabs(largest: int) -> int:
        steps = Steps(largest, 0, 0)
        try:
            return plan(Wanted(**{**vars(wanted), "kv": None, "steps": steps}), free).num_slabs
        except InsufficientMemory:
            return 0

    assert slabs(2 * GiB) <= slabs(GiB) <= slabs(0)


def test_a_measured_step_leaves_auto_more_than_half_of_the_device() -> None:
    wanted = Wanted(256, 320, 8192, 8192, 2**17, 512, 8192)
    guessed = plan(wanted, 100 * GiB)
    measured = plan(Wanted(**{**vars(wanted), "steps": Steps(3 * GiB, GiB, GiB)}), 100 * GiB)
    assert guessed.granted <= 50 * GiB < measured.granted
    assert "largest step: 3,072 MiB" in str(measured)


def test_a_kv_cache_near_the_free_memory_is_refused_once_steps_are_counted() -> None:
    kv = 60 * GiB
    wanted = Wanted(256, 320, 8192, 8192, 2**17, 512, 8192, kv=kv, prefix=GiB)
    assert plan(wanted, 80 * GiB).granted == kv
    steps = Steps(12 * GiB, GiB, GiB)
    with pytest.raises(InsufficientMemory, match=r"a step of 8,192 tokens takes 12,288 MiB") as caught:
        plan(Wanted(**{**vars(wanted), "steps": steps}), 80 * GiB)
    assert "PRELUDE_MAX_BATCH_TOKENS" in caught.value.remedy
    assert "PRELUDE_KV_MEMORY to at most" in caught.value.remedy
