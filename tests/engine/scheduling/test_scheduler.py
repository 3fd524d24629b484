"""Who runs when: fair between tasks, prefixes computed once, budgets kept, a full pool makes everybody wait in turn."""

from __future__ import annotations

import time
from typing import Any

import pytest

from server.contracts import Delta
from server.engine.engine import Engine
from server.engine.model.frozen import FrozenModel
from tests.engine.scheduling.steps import run, tokens_per_step
from tests.support import make_engine, random_kv_prompt, random_soft_prompt, request, run_engine


def test_no_step_exceeds_its_token_budget_and_long_inputs_are_prefilled_in_chunks(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_batch_tokens=16)
    engine.add(request("short", [1, 2], max_new_tokens=10), None)
    engine.add(request("long", list(range(60)), max_new_tokens=2), None)
    counts = tokens_per_step(engine)
    assert max(counts) == 16
    assert len(counts) >= 10


def test_inputs_fill_a_step_whatever_the_lengths_of_those_before(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=8, max_batch_tokens=64)
    for name, length in (("first", 40), ("second", 100), ("third", 10)):
        engine.add(request(name, list(range(length)), max_new_tokens=1), None)
    assert [span.count for _, span in engine.scheduler.schedule()] == [40, 24]
    assert tokens_per_step(engine) == [64, 64, 22]


def test_decoding_goes_on_while_another_sequence_is_prefilled(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_batch_tokens=16)
    engine.add(request("short", [1, 2], max_new_tokens=10), None)
    engine.step()
    engine.add(request("long", list(range(80)), max_new_tokens=2), None)
    for _ in range(4):  # the long one is still being prefilled
        assert [delta.request_id for delta in engine.step()] == ["short"]


def test_a_prefix_is_computed_once_for_all_who_wait_for_it(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=16, max_batch_tokens=64)
    soft_prompt = random_soft_prompt(tiny.spec, 20)
    for i in range(12):
        engine.add(request(str(i), [i], "task", max_new_tokens=3), soft_prompt)
    counts = tokens_per_step(engine)
    assert engine.prefixes.computed == 1
    assert (engine.prefixes.hits, engine.prefixes.misses) == (11, 1)
    assert sum(counts) == 20 + 12 * 3, "20 virtual tokens once, then an input and two output tokens each"


def test_the_same_numbers_under_two_names_are_one_prefix(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    for name in ("a", "b"):
        run_engine(engine, [(request(name, [1], name, max_new_tokens=2), random_soft_prompt(tiny.spec, 5, seed=7))])
    assert engine.prefixes.computed == 1


def test_sequences_share_a_prefix_only_if_their_slots_hold_copies_of_one_computation(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=16, max_batch_tokens=64)
    soft_prompt = random_soft_prompt(tiny.spec, 20)

    def numbers() -> list[tuple[int, int]]:
        return [(span.prefix, span.prefix_length) for _, span in engine.scheduler.schedule() if span.count == 1]

    for name in ("computes", "copies"):
        engine.add(request(name, [1], "task", max_new_tokens=30), soft_prompt)
    engine.add(request("plain", [1, 2], max_new_tokens=30), None)
    for _ in range(3):
        engine.step()
    assert sorted(numbers()) == [(0, 0), (1, 20), (1, 20)]
    engine.prefixes.drop(soft_prompt.prefix_hash)
    engine.add(request("computes again", [1], "task", max_new_tokens=30), soft_prompt)
    for _ in range(3):
        engine.step()
    assert sorted(numbers()) == [(0, 0), (1, 20), (1, 20), (2, 20)]
    run(engine)


def test_whoever_waits_for_a_prefix_holds_up_no_other_task(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_batch_tokens=16)
    soft_prompt = random_soft_prompt(tiny.spec, 60)  # four steps of prefill
    engine.add(request("first", [1], "slow", max_new_tokens=1), soft_prompt)
    engine.add(request("second", [1], "slow", max_new_tokens=1), soft_prompt)
    engine.step()
    engine.add(request("other", [1], "quick", max_new_tokens=1), None)
    finished = [delta.request_id for delta in run(engine)]
    assert finished.index("other") < finished.index("second")
    assert finished[0] == "other"


def test_when_the_sequence_that_computes_a_prefix_is_aborted_the_next_one_takes_over(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_batch_tokens=16)
    soft_prompt = random_soft_prompt(tiny.spec, 60)
    for name in ("first", "second"):
        engine.add(request(name, [1], "task", max_new_tokens=2), soft_prompt)
    engine.step()
    engine.abort("first")
    assert [delta.request_id for delta in run(engine)] == ["second", "second"]
    assert engine.prefixes.computed == 1


def test_prefixes_beyond_the_budget_are_dropped_and_computed_again(tiny: FrozenModel) -> None:
    soft_prompts = [random_soft_prompt(tiny.spec, 5, seed) for seed in range(3)]
    one = 5 * tiny.spec.kv_width * 8
    engine = make_engine(tiny, prefix_bytes=2 * one)
    answers = []
    for seed in (0, 1, 2, 0):
        outcome = run_engine(engine, [(request("r", [1, 2], max_new_tokens=6), soft_prompts[seed])])
        answers.append(outcome["r"].token_ids)
    assert engine.prefixes.computed == 4
    assert (engine.prefixes.hits, engine.prefixes.misses) == (0, 4)
    assert engine.prefixes.num_bytes == 2 * one
    assert answers[0] == answers[3]


def test_a_kv_soft_prompt_needs_no_prefill(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    engine.add(request("r", [1, 2], max_new_tokens=1), random_kv_prompt(tiny.spec, 30))
    assert tokens_per_step(engine) == [2]


def test_places_that_are_kept_do_not_exceed_the_token_budget(tiny: FrozenModel) -> None:
    assert make_engine(tiny, max_sequences=16, max_batch_tokens=16).scheduler.max_running == 16
    assert make_engine(tiny, max_sequences=16, max_batch_tokens=17).scheduler.max_running == 17
    assert make_engine(tiny, max_sequences=16, max_batch_tokens=32).scheduler.max_running == 20


def test_a_long_request_that_finds_no_room_is_not_overtaken(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, num_slabs=1)  # one slab of 128: four short slots or one long one
    engine.add(request("a", [1], max_new_tokens=20), None)
    engine.step()
    engine.add(request("long", list(range(100)), max_new_tokens=2), None)
    engine.add(request("b", [1], max_new_tokens=2), None)
    finished = [delta.request_id for delta in run(engine) if delta.finish_reason]
    assert finished == ["a", "long", "b"]


def test_many_requests_are_admitted_in_one_step_as_far_as_the_budget_reaches(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=16, max_batch_tokens=64)
    for i in range(16):
        engine.add(request(str(i), [i], "task", max_new_tokens=4), None)
    engine.step()
    assert len(engine.scheduler.running) == 16


def test_integrity_holds_in_between_and_a_stolen_slot_is_seen(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    engine.add(request("r", [1, 2], max_new_tokens=4), None)
    engine.step()
    engine.scheduler.check_integrity()
    engine.kv_cache.allocator.release(next(iter(engine.kv_cache.allocator.used)))
    with pytest.raises(AssertionError, match="leaked or lost"):
        engine.scheduler.check_integrity()


def test_answers_do_not_depend_on_the_chunk_size(tiny: FrozenModel) -> None:
    soft_prompt = random_soft_prompt(tiny.spec, 20)
    asked = request("r", list(range(50)), "task", max_new_tokens=10)
    answers = {
        tuple(run_engine(make_engine(tiny, max_batch_tokens=size), [(asked, soft_prompt)])["r"].token_ids)
        for size in (8, 16, 33, 128)
    }
    assert len(answers) == 1


def copies(engine: Engine) -> int:
    """Bytes of all copies that waiting choices hold."""
    held = {id(s.shared): s.shared for s in engine.scheduler.waiting if s.shared is not None}
    return sum(copy.num_bytes for copy in held.values())


@pytest.mark.parametrize("kind", ["labels", "n"])
def test_copies_of_shared_inputs_stay_within_their_budget_whatever_number_of_tasks_asks_for_them(
    tiny: FrozenModel, kind: str
) -> None:
    per_position = tiny.spec.kv_width * 8
    budget = 3 * 20 * per_position
    engine = make_engine(tiny, max_sequences=4, max_batch_tokens=64, shared_bytes=budget)
    asked: dict[str, Any] = {"labels": [(i, 7, 9) for i in range(6)]} if kind == "labels" else {"n": 6}
    for i in range(60):
        engine.add(
            request(str(i), list(range(i, i + 20)), f"task {i}", max_new_tokens=3, ignore_eos=True, **asked), None
        )
    most = passed = 0
    deltas: list[Delta] = []
    engine.add(request("small", [1], "quiet", max_new_tokens=3, ignore_eos=True), None)
    while engine.has_work:
        deltas += engine.step()
        assert copies(engine) <= engine.scheduler.shared.num_bytes <= budget
        most = max(most, copies(engine))
        passed += sum(delta.request_id == "small" for delta in deltas) == 3 and engine.has_work
    assert most > budget / 3, "copies are made"
    assert passed > 20, "what makes no copy waits for none"
    assert sum(delta.finish_reason is not None and delta.is_last for delta in deltas) == 61
    engine.check_integrity()
    assert not len(engine.scheduler.shared)


def test_a_copy_larger_than_the_budget_is_made_when_there_is_no_other(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=2, shared_bytes=1)
    for name in ("a", "b", "c"):
        engine.add(request(name, list(range(30)), name, n=4, max_new_tokens=3, temperature=1.0), None)
    held = []
    while engine.has_work:
        engine.step()
        held.append(len(engine.scheduler.shared))
    assert max(held) == 1
    engine.check_integrity()


@pytest.mark.parametrize("after", range(8))
def test_a_request_that_is_aborted_or_fails_leaves_no_copy_behind(tiny: FrozenModel, after: int) -> None:
    engine = make_engine(tiny, max_sequences=2)
    for how in (engine.abort, engine.forget, lambda _: engine.fail_all("it broke")):
        engine.add(request("r", list(range(20)), n=6, max_new_tokens=4, temperature=1.0, ignore_eos=True), None)
        for _ in range(after):
            engine.step()
        how("r")
        engine.check_integrity()
        assert not engine.has_work
        assert not len(engine.scheduler.shared)


def test_aborting_many_takes_time_in_proportion_to_their_number(tiny: FrozenModel) -> None:
    def seconds_for(number: int) -> float:
        engine = make_engine(tiny)
        for i in range(number):
            engine.add(request(str(i), [1], "task"), None)
        started = time.thread_time()
        for i in reversed(range(number)):
            engine.abort(str(i))
        assert not engine.has_work
        return time.thread_time() - started

    few, many = (min(seconds_for(number) for _ in range(3)) for number in (500, 8000))
    assert many < 16 * few * 4, f"{few * 1e3:.1f} ms for 500, {many * 1e3:.1f} ms for 8,000"
