from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from server.engine.engine import Engine
from server.engine.model.frozen import FrozenModel
from server.engine.sampling.logit_rows import Batch
from server.engine.sampling.sampler import NextToken
from server.engine.to_device import Download
from tests.engine.scheduling.steps import run, tokens_per_step
from tests.support import make_engine, random_soft_prompt, request, run_engine


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


@pytest.mark.parametrize("length", range(4, 40))
def test_an_input_is_never_divided_into_a_single_token(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    engine = make_engine(tiny, max_sequences=4, max_batch_tokens=8)
    parts: list[int] = []
    run_batch = engine.runner.run

    def record(batch: Batch, before_wait: Callable[[Download], None]) -> list[NextToken]:
        parts.extend(span.count for sequence, span in batch if span.start < len(sequence.request.input_ids))
        return run_batch(batch, before_wait)

    monkeypatch.setattr(engine.runner, "run", record)
    for name, key, tokens in (("first", "a", length), ("second", "a", 13), ("third", "b", 9)):
        engine.add(request(name, [5] * tokens, "task", key_id=key, max_new_tokens=1), None)
    run(engine)
    assert sum(parts) == length + 13 + 9
    assert 1 not in parts


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
