"""Who runs when: fair between tasks, prefixes computed once, budgets kept, a full pool makes everybody wait in turn."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from server.contracts import Delta
from server.engine.engine import Engine
from server.engine.model.frozen import FrozenModel
from tests.support import make_engine, random_kv_prompt, random_soft_prompt, request, run_engine


def tokens_per_step(engine: Engine) -> list[int]:
    """Tokens that each step computed, until the engine is idle."""
    counts = []
    while engine.has_work:
        batch = engine.scheduler.schedule()
        counts.append(sum(span.count for _, span in batch))
        engine._commit(batch, engine._run(batch))
    return counts


def run(engine: Engine) -> list[Delta]:
    """Everything that an engine answers until it is idle."""
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
    return deltas


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


def test_a_flood_on_one_task_does_not_hold_up_another(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=2)
    for i in range(20):
        engine.add(request(f"flood {i}", [i], "flood", max_new_tokens=2), None)
    engine.add(request("single", [1], "quiet", max_new_tokens=2), None)
    finished = [delta.request_id for delta in run(engine) if delta.finish_reason]
    assert finished.index("single") <= 2


def test_a_task_of_which_nobody_runs_does_not_wait_for_the_long_answers_of_another(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=4)
    for i in range(8):
        engine.add(request(f"flood {i}", [i], "flood", max_new_tokens=60, ignore_eos=True), None)
    for _ in range(3):
        engine.step()
    engine.add(request("single", [1], "quiet", max_new_tokens=1), None)
    assert [sequence.request_id for sequence in engine.scheduler.running] == [f"flood {i}" for i in range(4)]
    assert "single" in {delta.request_id for delta in engine.step() if delta.finish_reason}
    run(engine)


def test_the_next_place_goes_to_the_task_of_which_the_fewest_run(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=4)
    for i in range(4):
        engine.add(request(f"flood {i}", [i], "flood", max_new_tokens=4 + 4 * i, ignore_eos=True), None)
    engine.step()
    for i in range(4):
        engine.add(request(f"more {i}", [i], "flood", max_new_tokens=40, ignore_eos=True), None)
    for i in range(3):
        engine.add(request(f"quiet {i}", [i], "quiet", max_new_tokens=40, ignore_eos=True), None)
    for _ in range(12):
        engine.step()
    # One quiet one came in by the kept place; those that the flood gave back went to the quiet ones until both had two.
    tasks = [sequence.request.task for sequence in engine.scheduler.running]
    assert (tasks.count("flood"), tasks.count("quiet")) in ((2, 2), (2, 3))
    run(engine)


LABELS = tuple((i, 7) for i in range(40))
"""Each takes a step of its own behind the input, so they end in the order in which they begin."""


def test_a_small_request_begins_between_the_choices_of_a_large_one_of_its_task(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=2)
    soft_prompt = random_soft_prompt(tiny.spec, 5)
    engine.add(request("large", [1, 2, 3], "task", labels=LABELS), soft_prompt)
    engine.step()
    assert len(engine.scheduler.waiting) == len(LABELS)
    for i in range(3):
        engine.add(request(f"small {i}", [i], "task", max_new_tokens=1), soft_prompt)
    engine.add(request("twins", [9], "task", labels=LABELS[:2]), soft_prompt)
    ended = [delta.request_id for delta in run(engine) if delta.finish_reason]
    begun = [ended[: ended.index(name)].count("large") for name in ("small 0", "small 1", "small 2", "twins")]
    assert begun == pytest.approx([8, 16, 24, 32], abs=2), "not behind all 40"
    assert (ended.count("large"), ended[-1]) == (40, "large"), "nor does the large one wait for all of them"


def test_what_begins_in_between_changes_no_answer(tiny: FrozenModel) -> None:
    soft_prompt = random_soft_prompt(tiny.spec, 5)
    large = request("large", [1, 2, 3], "task", labels=LABELS)
    small = [request(f"small {i}", [i, 4], "task", max_new_tokens=5, n=1 + i % 3, temperature=1.0) for i in range(6)]
    busy = run_engine(make_engine(tiny, max_sequences=3), [(asked, soft_prompt) for asked in (large, *small)])
    for asked in (large, *small):
        for name, alone in run_engine(make_engine(tiny), [(asked, soft_prompt)]).items():
            assert busy[name].token_ids == alone.token_ids
            assert [s.logprob for s in busy[name].scored] == pytest.approx([s.logprob for s in alone.scored], abs=1e-9)


def test_a_request_as_large_as_the_one_before_it_does_not_begin_between_its_choices(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=1)
    for name in ("first", "second", "third"):
        engine.add(request(name, [1, 2, 3], "task", labels=LABELS), None)
    ended = [delta.request_id for delta in run(engine) if delta.finish_reason]
    assert ended == [name for name in ("first", "second", "third") for _ in LABELS]


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


def test_a_key_that_floods_a_task_holds_up_no_other_key_of_that_task(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=4, max_batch_tokens=16)
    for i in range(40):
        engine.add(request(f"flood {i}", [1, 2, 3], "task", key_id="a", max_new_tokens=8, ignore_eos=True), None)
    for _ in range(3):
        engine.step()
    engine.add(request("other", [1, 2, 3], "task", key_id="b", max_new_tokens=2, ignore_eos=True), None)
    ended = [delta.request_id for _ in range(3) for delta in engine.step() if delta.finish_reason]
    assert "other" in ended, "it begins in the next step, in a reserved place"


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 7])
def test_inputs_of_several_keys_advance_with_any_token_budget(tiny: FrozenModel, max_batch_tokens: int) -> None:
    engine = make_engine(tiny, max_sequences=max_batch_tokens, max_batch_tokens=max_batch_tokens)
    for key in "abc":
        engine.add(request(key, [1, 2, 3, 4], "task", key_id=key, max_new_tokens=2, ignore_eos=True), None)
    ended = [delta.request_id for _ in range(3 * 5) for delta in engine.step() if delta.finish_reason]
    assert sorted(ended) == ["a", "b", "c"], "each step computes one token at least"


def ended_in_order(engine: Engine) -> list[str]:
    return [delta.request_id for delta in run(engine) if delta.finish_reason]


def test_a_key_gets_no_more_places_by_asking_many_tasks(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=4)
    for i in range(40):
        engine.add(request(f"a{i}", [i], f"task {i}", key_id="a", max_new_tokens=2, ignore_eos=True), None)
    for i in range(8):
        engine.add(request(f"b{i}", [i], "task 0", key_id="b", max_new_tokens=2, ignore_eos=True), None)
        engine.add(request(f"c{i}", [i], f"task {i % 2}", key_id="c", max_new_tokens=2, ignore_eos=True), None)
    ended = ended_in_order(engine)
    among_first = Counter(name[0] for name in ended[:30])
    assert among_first["b"] == among_first["c"] == 8, among_first
    assert len(ended) == 56


def test_the_tasks_of_a_key_take_turns(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=2)
    for i in range(20):
        engine.add(request(f"flood {i}", [i], "flood", key_id="a", max_new_tokens=2), None)
        engine.add(request(f"other {i}", [i], "other", key_id="b", max_new_tokens=2), None)
    engine.add(request("single", [1], "quiet", key_id="a", max_new_tokens=2), None)
    assert ended_in_order(engine).index("single") <= 5


def test_places_are_kept_for_a_key_beside_one_with_long_answers_of_many_tasks(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=8, max_batch_tokens=64)
    for i in range(40):
        engine.add(request(f"a{i}", [i], f"task {i}", key_id="a", max_new_tokens=60, ignore_eos=True), None)
    for _ in range(3):
        engine.step()
    assert len(engine.scheduler.running) == 9, "one of the two places that are kept is for tasks, one for other keys"
    engine.add(request("b", [1], "task 1", key_id="b", max_new_tokens=1), None)
    assert "b" in {delta.request_id for delta in engine.step() if delta.finish_reason}


def test_long_inputs_of_a_key_take_a_part_of_each_step_beside_another_key_and_all_of_it_alone(
    tiny: FrozenModel,
) -> None:
    engine = make_engine(tiny, max_sequences=8, max_batch_tokens=64)
    for i in range(3):
        engine.add(request(f"long {i}", list(range(100)), key_id="a", max_new_tokens=1), None)
    assert sum(span.count for _, span in engine.scheduler.schedule()) == 64
    for i in range(4):
        engine.add(request(f"short {i}", [1, 2], key_id="b", max_new_tokens=6, ignore_eos=True), None)
    counts = tokens_per_step(engine)
    assert counts[0] == 8 + 8, "four inputs of two tokens; and a sixteenth of 64 for each of the two keys"
    assert counts[1:6] == [4 + 4 + 4] * 5, "they decode; a sixteenth of 64, and as many tokens as they take"
    assert max(counts[6:]) == 64, "the key runs alone again"


def test_inputs_of_a_key_that_wait_to_be_computed_keep_no_other_key_from_a_place(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=8, max_batch_tokens=16)
    engine.add(request("long", list(range(100)), key_id="a", max_new_tokens=1), None)
    engine.step()
    engine.add(request("short", [1], key_id="b", max_new_tokens=1), None)
    assert [delta.request_id for delta in engine.step() if delta.finish_reason] == ["short"]


def test_texts_that_wait_for_their_grammar_take_nothing_from_the_inputs_of_their_key(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=16, max_batch_tokens=64)
    for i in range(12):
        engine.add(request(f"held {i}", [1], key_id="a", max_new_tokens=5, ignore_eos=True), None)
    engine.add(request("other", [1], key_id="b", max_new_tokens=5, ignore_eos=True), None)
    engine.step()
    for sequence in [sequence for sequence in engine.scheduler.running if sequence.request.key_id == "a"]:
        sequence.num_computed = sequence.num_known  # no token comes until the grammar's process has answered
    engine.add(request("long", list(range(50)), key_id="a", max_new_tokens=1), None)
    counts = {sequence.request_id: span.count for sequence, span in engine.scheduler.schedule()}
    assert counts == {"other": 1, "long": 64 // 16 + 1}


def test_texts_of_a_key_take_turns_where_they_would_take_most_of_each_step_beside_another_key(
    tiny: FrozenModel,
) -> None:
    engine = make_engine(tiny, max_sequences=16, max_batch_tokens=64)
    drawn = [
        request(f"many {i}", [1], key_id="a", max_new_tokens=9, temperature=1.0, ignore_eos=True) for i in range(16)
    ]
    for one in drawn[:8]:
        engine.add(one, None)
    assert max(tokens_per_step(engine)) == 8, "alone, all of them decode in each step"
    for one in drawn[8:]:
        engine.add(one, None)
    engine.add(request("one", [1], key_id="b", max_new_tokens=12, ignore_eos=True), None)
    for step in range(1, 12):
        engine.step()
        written = {sequence.request_id: len(sequence.output_ids) for sequence in engine.scheduler.running}
        assert written.pop("one") == step
        many = written.values()
        assert sum(many) == 2 * step, "a sixteenth of 64, and one token as the other key takes: two costly rows"
        assert max(many) - min(many) <= 1, "in turn"
    assert max(tokens_per_step(engine)) == 8, "the key runs alone again"


def test_inputs_of_a_key_are_computed_beside_its_own_texts_where_these_would_take_all_that_it_may(
    tiny: FrozenModel,
) -> None:
    engine = make_engine(tiny, max_sequences=16, max_batch_tokens=128)
    for i in range(12):
        engine.add(request(f"text {i}", [1], key_id="a", max_new_tokens=30, ignore_eos=True), None)
    engine.step()
    engine.add(request("other", [1], key_id="b", max_new_tokens=30, ignore_eos=True), None)
    engine.add(request("long", list(range(50)), key_id="a", max_new_tokens=1), None)
    engine.step()
    counts = [(sequence.request_id, span.count) for sequence, span in engine.scheduler.schedule()]
    assert counts[-1] == ("long", (128 // 16 + 1) // 2)
    assert len(counts) == 1 + 5 + 1, "the other key's text, five of the key's own in turn, and its input"
