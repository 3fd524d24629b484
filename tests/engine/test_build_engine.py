"""The KV memory that the settings ask for is worked out, told, and refused with the remedy where it does not fit."""

from __future__ import annotations

import pytest

from server.engine.build_engine import build_engine, plan_memory
from server.engine.memory.kv_cache import bytes_per_position
from server.engine.memory.plan import MiB
from server.engine.model.frozen import FrozenModel
from server.errors import ConfigurationError, InsufficientMemory
from server.settings import Settings

GiB = 1024 * MiB


def test_auto_takes_what_the_settings_ask_for_if_it_fits(tiny: FrozenModel) -> None:
    plan = plan_memory(Settings(max_sequences=4), tiny.spec, free=GiB)
    assert plan.num_slabs == 4
    assert plan.granted == plan.requested == 4 * 128 * bytes_per_position(tiny.spec)
    assert plan.prefix_bytes == plan.granted // 4


def test_auto_takes_at_most_half_of_what_is_free_and_says_so(tiny: FrozenModel) -> None:
    slab = 128 * bytes_per_position(tiny.spec)
    plan = plan_memory(Settings(max_sequences=100), tiny.spec, free=10 * slab)
    assert plan.num_slabs == 5
    assert "asked for" in str(plan)


def test_an_explicit_size_is_taken_as_it_is(tiny: FrozenModel) -> None:
    plan = plan_memory(Settings(kv_memory="1MiB", prefix_memory="2MiB"), tiny.spec, free=GiB)
    assert plan.granted <= MiB
    assert plan.prefix_bytes == 2 * MiB


def test_more_than_is_free_is_refused_with_the_size_that_would_fit(tiny: FrozenModel) -> None:
    with pytest.raises(InsufficientMemory, match="3 MiB are free") as caught:
        plan_memory(Settings(kv_memory="8MiB"), tiny.spec, free=3 * MiB)
    assert "3MiB" in caught.value.remedy


def test_less_than_one_sequence_is_refused_with_the_least_size(tiny: FrozenModel) -> None:
    with pytest.raises(InsufficientMemory, match="does not hold one sequence") as caught:
        plan_memory(Settings(kv_memory="1000"), tiny.spec, free=GiB)
    assert "at least" in caught.value.remedy


def test_a_step_that_could_not_serve_every_sequence_is_refused(tiny: FrozenModel) -> None:
    with pytest.raises(ConfigurationError, match="MAX_BATCH_TOKENS"):
        build_engine(Settings(max_sequences=64, max_batch_tokens=32), tiny)


def test_the_engine_is_built_as_planned(tiny: FrozenModel) -> None:
    engine = build_engine(Settings(max_sequences=2, max_batch_tokens=32), tiny)
    assert engine.kv_cache.allocator.num_positions == 2 * 128


@pytest.mark.parametrize(("kv", "prefix"), [("auto", "auto"), ("6MiB", "auto"), ("6MiB", "1MiB"), ("auto", "6MiB")])
def test_what_is_granted_in_all_fits_what_is_free_or_is_refused_with_what_would(
    tiny: FrozenModel, kv: str, prefix: str
) -> None:
    slab = 128 * bytes_per_position(tiny.spec)
    granted = refused = 0
    for free in range(slab // 2, 12 * MiB, 3 * slab):
        settings = Settings(kv_memory=kv, prefix_memory=prefix, max_sequences=100)
        try:
            plan = plan_memory(settings, tiny.spec, free=free)
        except InsufficientMemory:
            refused += 1
        else:
            assert plan.granted + plan.prefix_bytes + plan.shared_bytes <= free
            granted += 1
    assert granted
    assert refused


def test_the_size_that_a_refusal_names_is_taken(tiny: FrozenModel) -> None:
    with pytest.raises(InsufficientMemory, match="prefixes may take") as caught:
        plan_memory(Settings(kv_memory="9MiB"), tiny.spec, free=10 * MiB)
    named = caught.value.remedy.split("at most ")[1].split(",")[0]
    plan_memory(Settings(kv_memory=named), tiny.spec, free=10 * MiB)
