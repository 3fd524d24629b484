"""Several choices of one request: each is what it would be alone, the input is computed once, the request ends once."""

from __future__ import annotations

import math

import pytest
import torch

from server.contracts import FinishReason
from server.engine.model.frozen import FrozenModel
from server.errors import EmptyInput, InputTooLong
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.support import (
    RecordingModel,
    make_engine,
    random_kv_prompt,
    random_soft_prompt,
    request,
    run_engine,
)

INPUT = (72, 101, 108, 108, 111)


def distributions(model: FrozenModel, ids: tuple[int, ...], soft_prompt: SoftPrompt | None) -> torch.Tensor:
    """Log-probabilities `[tokens, vocab_size]` of what follows each of these tokens, from prefixes of its own each."""
    rows = []
    for end in range(1, len(ids) + 1):
        recording = RecordingModel(model)
        run_engine(make_engine(recording), [(request("r", ids[:end], max_new_tokens=1, ignore_eos=True), soft_prompt)])
        rows.append(recording.last_logits[-1].log_softmax(-1))
    return torch.stack(rows)


@pytest.fixture(params=["none", "embeddings", "kv"])
def soft_prompt(tiny: FrozenModel, request: pytest.FixtureRequest) -> SoftPrompt | None:
    kinds = {"none": None, "embeddings": random_soft_prompt(tiny.spec, 7), "kv": random_kv_prompt(tiny.spec, 7)}
    return kinds[request.param]


def test_greedy_choices_are_all_the_answer_of_a_single_one(tiny: FrozenModel, soft_prompt: SoftPrompt | None) -> None:
    alone = run_engine(make_engine(tiny), [(request("r", INPUT, max_new_tokens=9), soft_prompt)])["r"]
    outcomes = run_engine(make_engine(tiny), [(request("r", INPUT, n=3, max_new_tokens=9), soft_prompt)])
    assert [outcomes[name].token_ids for name in ("r", "r/1", "r/2")] == [alone.token_ids] * 3
    assert [outcomes[name].finish_reason for name in ("r", "r/1", "r/2")] == [alone.finish_reason] * 3


def test_sampled_choices_differ_and_their_seeds_repeat_them_in_any_batch(tiny: FrozenModel) -> None:
    asked = request("r", INPUT, n=4, max_new_tokens=12, temperature=1.5, seed=5, ignore_eos=True)
    neighbours = [(request(str(i), [i, 2], max_new_tokens=20, temperature=2.0, seed=i), None) for i in range(6)]
    quiet = run_engine(make_engine(tiny), [(asked, None)])
    busy = run_engine(make_engine(tiny, max_sequences=3), [*neighbours, (asked, None)], arrive_every=2)
    names = ["r", "r/1", "r/2", "r/3"]
    assert [quiet[name].token_ids for name in names] == [busy[name].token_ids for name in names]
    assert len({tuple(quiet[name].token_ids) for name in names}) == 4
    single = request("r", INPUT, max_new_tokens=12, temperature=1.5, seed=5, ignore_eos=True)
    assert run_engine(make_engine(tiny), [(single, None)])["r"].token_ids == quiet["r"].token_ids


def test_the_input_is_computed_once_for_all_choices(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=16, max_batch_tokens=64)
    engine.add(request("r", range(40), n=8, max_new_tokens=3, ignore_eos=True), random_soft_prompt(tiny.spec, 20))
    tokens = []
    while engine.has_work:
        batch = engine.scheduler.schedule()
        tokens.append(sum(span.count for _, span in batch))
        engine._commit(batch, engine.run(batch))
    assert tokens == [60, 8, 8]


@pytest.mark.parametrize("new_tokens", [1, 2, 20])
@pytest.mark.parametrize("max_sequences", [1, 2, 8])
def test_a_request_of_many_choices_ends_once_however_small_the_engine_is(
    tiny: FrozenModel, new_tokens: int, max_sequences: int
) -> None:
    asked = [
        (request(f"{i}", INPUT[: i + 1], n=5, max_new_tokens=new_tokens, temperature=1.0, seed=i), None)
        for i in range(4)
    ]
    engine = make_engine(tiny, max_sequences=max_sequences, num_slabs=1)
    outcomes = run_engine(engine, asked, arrive_every=1)
    assert len(outcomes) == 20
    assert all(outcome.ends == 1 for outcome in outcomes.values())
    assert [sum(outcomes[f"{i}" + (f"/{k}" if k else "")].lasts for k in range(5)) for i in range(4)] == [1] * 4
    assert not engine.kv_cache.allocator.used


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_an_abort_ends_all_choices_wherever_they_are(tiny: FrozenModel, step: int) -> None:
    engine = make_engine(tiny, max_sequences=3, max_batch_tokens=8)
    soft_prompt = random_soft_prompt(tiny.spec, 12)
    asked = request("r", INPUT, "task", n=5, max_new_tokens=40, ignore_eos=True)
    other = request("other", INPUT, max_new_tokens=4)
    outcomes = run_engine(engine, [(asked, soft_prompt), (other, None)], abort={step: "r"})
    reasons = [outcome.finish_reason for outcome in outcomes.values()]
    assert reasons.count(FinishReason.ABORTED) == 1
    assert outcomes["other"].ends == 1
    assert not engine.kv_cache.allocator.used
    assert not engine.scheduler._users


def test_given_tokens_are_scored_as_the_model_sees_them_come(tiny: FrozenModel, soft_prompt: SoftPrompt | None) -> None:
    expected = distributions(tiny, INPUT, soft_prompt)
    asked = request("r", INPUT, input_logprobs=True, logprobs=True, top_logprobs=3, max_new_tokens=4, ignore_eos=True)
    outcome = run_engine(make_engine(tiny, max_batch_tokens=8, max_sequences=4), [(asked, soft_prompt)])["r"]
    assert [scored.id for scored in outcome.scored] == list(INPUT)
    assert (outcome.scored[0].logprob, outcome.scored[0].top) == (None, ())
    for position, scored in enumerate(outcome.scored[1:], 1):
        row = expected[position - 1]
        assert scored.logprob == pytest.approx(float(row[INPUT[position]]), abs=1e-9)
        assert [candidate.id for candidate in scored.top] == row.topk(3).indices.tolist()
        assert [candidate.logprob for candidate in scored.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-9)
    plain = run_engine(make_engine(tiny), [(request("r", INPUT, max_new_tokens=4, ignore_eos=True), soft_prompt)])["r"]
    assert outcome.token_ids == plain.token_ids


@pytest.mark.parametrize("inputs", [INPUT, INPUT[:1]])
def test_with_no_new_token_the_input_is_only_scored(tiny: FrozenModel, inputs: tuple[int, ...]) -> None:
    asked = request("r", inputs, input_logprobs=True, max_new_tokens=0)
    outcome = run_engine(make_engine(tiny), [(asked, None)])["r"]
    assert (outcome.token_ids, outcome.finish_reason, outcome.ends) == ([], FinishReason.LENGTH, 1)
    assert [scored.id for scored in outcome.scored] == list(inputs)


def test_many_choices_of_no_tokens_all_end(tiny: FrozenModel) -> None:
    outcomes = run_engine(make_engine(tiny), [(request("r", INPUT, n=3, max_new_tokens=0), None)])
    assert [outcome.ends for outcome in outcomes.values()] == [1, 1, 1]
    assert sum(outcome.lasts for outcome in outcomes.values()) == 1


def test_first_draws_of_many_choices_are_shared_out_to_steps(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=8, max_batch_tokens=16)
    for i in range(8):
        engine.add(request(str(i), INPUT, n=12, max_new_tokens=1, temperature=1.0), None)
    most = 0
    while engine.has_work:
        batch = engine.scheduler.schedule()
        most = max(most, sum(1 + len(sequence.siblings) for sequence, _ in batch))
        engine._commit(batch, engine.run(batch))
    assert most <= 16 + 12


LABELS = [(7,), (7, 9), (200, 3, 5, 5), (9,)]


@pytest.mark.parametrize("max_batch_tokens", [8, 64])
@pytest.mark.parametrize("inputs", [INPUT, INPUT[:1]])
@pytest.mark.parametrize("labels", [LABELS, [(9,), (200, 3, 5, 5)], [(7, 9), (7,)]])
def test_labels_are_scored_whole(
    tiny: FrozenModel,
    soft_prompt: SoftPrompt | None,
    labels: list[tuple[int, ...]],
    inputs: tuple[int, ...],
    max_batch_tokens: int,
) -> None:
    engine = make_engine(tiny, max_batch_tokens=max_batch_tokens, max_sequences=4)
    outcomes = run_engine(engine, [(request("r", inputs, labels=labels), soft_prompt)])
    assert not engine.kv_cache.allocator.used
    for index, label in enumerate(labels):
        expected = distributions(tiny, inputs + label, soft_prompt)
        outcome = outcomes[f"r/{index}" if index else "r"]
        assert [scored.id for scored in outcome.scored] == list(label)
        logprobs = [float(expected[len(inputs) - 1 + k][token]) for k, token in enumerate(label)]
        assert [scored.logprob for scored in outcome.scored] == pytest.approx(logprobs, abs=1e-9)
        assert (outcome.ends, outcome.token_ids) == (1, [])
    assert sum(outcome.lasts for outcome in outcomes.values()) == 1


def test_labels_take_one_step_and_another_only_if_several_have_more_than_one_token(tiny: FrozenModel) -> None:
    engine = make_engine(tiny, max_sequences=16, max_batch_tokens=64)
    for labels, steps in (([(1,), (2,)], 1), ([(1,), (2, 3, 4)], 1), ([(2, 3)], 1), (LABELS, 2)):
        before = engine.steps
        run_engine(engine, [(request("r", INPUT, labels=labels), None)])
        assert engine.steps - before == steps


def test_a_label_that_follows_its_input_changes_nothing_for_other_sequences(tiny: FrozenModel) -> None:
    asked = [
        (request(str(i), INPUT[: 2 + i % 4], labels=[(7, 9 + i), (8,)] if i % 3 else [(7,), (8,)]), None)
        for i in range(9)
    ]
    together = run_engine(make_engine(tiny, max_sequences=16, max_batch_tokens=128), asked)
    for one in asked:
        for name, outcome in run_engine(make_engine(tiny, max_sequences=16, max_batch_tokens=128), [one]).items():
            expected = [scored.logprob for scored in together[name].scored]
            assert [scored.logprob for scored in outcome.scored] == pytest.approx(expected, abs=1e-9)


def test_labels_wait_for_slots_like_everybody(tiny: FrozenModel) -> None:
    labels = [(i, i + 1, i + 2) for i in range(20)]
    small = make_engine(tiny, max_sequences=2, num_slabs=1)
    large = make_engine(tiny, max_sequences=32, max_batch_tokens=128)
    outcomes = [run_engine(engine, [(request("r", INPUT, labels=labels), None)]) for engine in (small, large)]
    logprobs = [[[s.logprob for s in o.scored] for o in outcome.values()] for outcome in outcomes]
    for one, other in zip(*logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_a_choice_that_is_not_finite_ends_its_whole_request(tiny: FrozenModel) -> None:
    poison = SoftPrompt("PROMPT_TUNING", torch.full((4, tiny.spec.hidden_size), float("inf")))
    engine = make_engine(tiny)
    for asked in (
        request("n", INPUT, n=3, max_new_tokens=5),
        request("labels", INPUT, labels=LABELS),
        request("scored", INPUT, input_logprobs=True, max_new_tokens=0),
    ):
        outcomes = run_engine(engine, [(asked, poison), (request("healthy", INPUT, max_new_tokens=3), None)])
        reasons = [outcome.finish_reason for outcome in outcomes.values()]
        assert reasons.count(FinishReason.FAILED) == 1
        assert outcomes["healthy"].finish_reason is not FinishReason.FAILED
    assert not engine.kv_cache.allocator.used


def test_log_probabilities_of_a_choice_sum_up_to_its_share(tiny: FrozenModel) -> None:
    """Scoring what was generated gives what was reported while it was generated."""
    said = run_engine(
        make_engine(tiny), [(request("r", INPUT, max_new_tokens=6, logprobs=True, ignore_eos=True), None)]
    )
    label = tuple(said["r"].token_ids)
    scored = run_engine(make_engine(tiny), [(request("r", INPUT, labels=[label]), None)])["r"].scored
    assert math.fsum(s.logprob or 0 for s in scored) == pytest.approx(math.fsum(p or 0 for p in said["r"].logprobs))


def test_labels_that_can_never_fit_are_refused(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    with pytest.raises(InputTooLong, match="124 of the longest label"):
        engine.check(request("r", INPUT, labels=[(1,), (1,) * 124]), None)
    with pytest.raises(EmptyInput, match="label contains no token"):
        engine.check(request("r", INPUT, labels=[(1,), ()]), None)
    assert not engine.has_work
