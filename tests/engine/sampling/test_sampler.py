"""Each row is chosen under its own rules; the filters are transformers' own, the draw is the seed's."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.engine.sampling.sampler import NUMBERS_AT_ONCE
from server.engine.scheduling.sequence import Sequence
from server.engine.text.detokenizer import Detokenizer
from server.engine.text.token_texts import TokenTexts
from tests.engine.sampling.choosing import choose_next
from tests.support import EOS, VOCAB_SIZE, byte_tokenizer, request

NO_EOS: frozenset[int] = frozenset()
TEXTS = TokenTexts(byte_tokenizer().backend_tokenizer)


def sequence(seed: int = 0, input_ids: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> Sequence:
    return Sequence(request("r", input_ids, seed=seed, **sampling), None, Detokenizer(TEXTS))


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def draws(row: torch.Tensor, count: int = 3000, **sampling: Any) -> Counter[int]:
    """Tokens drawn from one row of logits by so many seeds."""
    sequences = [sequence(seed, **sampling) for seed in range(count)]
    chosen = choose_next(row.expand(count, -1), sequences, NO_EOS)
    return Counter(choice.token_id for choice in chosen if choice.token_id is not None)


def test_greedy_is_the_most_likely_token() -> None:
    rows = logits(5)
    assert [c.token_id for c in choose_next(rows, [sequence() for _ in range(5)], NO_EOS)] == rows.argmax(-1).tolist()


def test_the_logits_are_not_changed() -> None:
    rows = logits(2)
    before = rows.clone()
    choose_next(rows, [sequence(temperature=1.0, repetition_penalty=2.0, min_new_tokens=3)] * 2, frozenset({EOS}))
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        (
            {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
            [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
        ),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"typical_p": 0.5}, [TypicalLogitsWarper(0.5)]),
        ({"typical_p": 0.01}, [TypicalLogitsWarper(0.01)]),
        (
            {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.8},
            [
                TemperatureLogitsWarper(1.3),
                TopKLogitsWarper(40),
                TopPLogitsWarper(0.95),
                MinPLogitsWarper(0.02),
                TypicalLogitsWarper(0.8),
            ],
        ),
        ({"repetition_penalty": 3.0}, [RepetitionPenaltyLogitsProcessor(3.0)]),
    ],
)
def test_draws_follow_the_distribution_that_transformers_would_draw_from(
    sampling: dict[str, Any], warpers: list[Any]
) -> None:
    row = logits()
    expected = row
    for warper in warpers:
        expected = warper(torch.tensor([[1, 2, 3]]), expected)
    probabilities = expected.softmax(-1)[0]
    counts = draws(row, **({"temperature": 1.0} | sampling))
    assert set(counts) <= set(probabilities.nonzero().flatten().tolist())
    for token in probabilities.topk(3).indices.tolist():
        p = float(probabilities[token])
        assert counts[token] / 3000 == pytest.approx(p, abs=4 * (p * (1 - p) / 3000) ** 0.5 + 1e-9)


def test_rows_of_different_rules_do_not_disturb_each_other() -> None:
    rules: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 3},
        {"temperature": 2.0, "top_p": 0.5},
        {"repetition_penalty": 1.5},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "min_new_tokens": 2},
    ]
    rows = logits(len(rules))
    together = choose_next(rows, [sequence(i, **rule) for i, rule in enumerate(rules)], frozenset({EOS}))
    apart = [choose_next(rows[i : i + 1], [sequence(i, **rule)], frozenset({EOS}))[0] for i, rule in enumerate(rules)]
    assert together == apart


def random_rules(rng: random.Random) -> dict[str, Any]:
    """Any rules that a request may have."""
    some: dict[str, list[Any]] = {
        "temperature": [0.5, 1.0, 1.7],
        "top_k": [1, 7, 1000],
        "top_p": [0.1, 0.9],
        "min_p": [0.05],
        "typical_p": [0.3, 0.9],
        "repetition_penalty": [0.8, 1.3],
        "presence_penalty": [0.5, -0.5],
        "frequency_penalty": [0.3],
        "logit_bias": [((3, 1.5), (4, -2.0)), ((250, 3.0),)],
        "min_new_tokens": [9],
        "logprobs": [True],
        "top_logprobs": [0, 4],
    }
    return {name: rng.choice(values) for name, values in some.items() if rng.random() < 0.35}


def grown(seed: int, rules: dict[str, Any]) -> Sequence:
    """A sequence that has generated some tokens."""
    rng = random.Random(seed)
    one = sequence(seed, tuple(rng.randrange(256) for _ in range(9)), **rules)
    for _ in range(rng.randrange(6)):
        one.append(rng.randrange(256))
    return one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_chosen_bit_for_bit_alike_whatever_its_neighbours(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(7)
    rules = [random_rules(rng) for _ in range(60)]
    rows = logits(len(rules)).to(dtype)
    together = choose_next(rows, [grown(i, rule) for i, rule in enumerate(rules)], frozenset({EOS}))
    apart = [choose_next(rows[i : i + 1], [grown(i, rule)], frozenset({EOS}))[0] for i, rule in enumerate(rules)]
    monkeypatch.setitem(NUMBERS_AT_ONCE, "cpu", 7 * VOCAB_SIZE)
    in_sevens = choose_next(rows, [grown(i, rule) for i, rule in enumerate(rules)], frozenset({EOS}))
    assert together == apart == in_sevens


class BrokenWalk:
    """A grammar's walk that raises when it is asked."""

    def allowed_bits(self) -> np.ndarray:
        """Nothing."""
        raise RuntimeError("broken")


def test_rules_that_raise_end_their_own_row_and_change_no_other() -> None:
    def asked() -> list[Sequence]:
        return [grown(i, {"repetition_penalty": 1.3, "temperature": 1.0, "logit_bias": ((3, 2.0),)}) for i in range(6)]

    rows = logits(6)
    expected, broken = choose_next(rows, asked(), NO_EOS), asked()
    broken[1].walk = BrokenWalk()  # type: ignore[assignment]
    broken[2] = sequence(logit_bias=((VOCAB_SIZE, 5.0),))
    broken[3] = sequence(input_ids=(1, -1), repetition_penalty=2.0)
    broken[4] = sequence(min_new_tokens=3, stop_token_ids=frozenset({VOCAB_SIZE + 3}))
    chosen = choose_next(rows, broken, NO_EOS)
    assert [chosen[0], chosen[5]] == [expected[0], expected[5]]
    assert [choice.token_id for choice in chosen[1:5]] == [None] * 4
    assert [type(one.error) for one in broken] == [
        type(None),
        RuntimeError,
        IndexError,
        IndexError,
        IndexError,
        type(None),
    ]


def test_a_grammar_leaves_only_what_its_mask_allows() -> None:
    class Walk:
        def allowed_bits(self) -> np.ndarray:
            return np.array([0b00010000, 0b00000001], dtype=np.uint8)

    ruled = [sequence(seed, temperature=5.0) for seed in range(200)]
    for one in ruled:
        one.walk = Walk()  # type: ignore[assignment]
    rows = logits().expand(200, -1)
    assert {choice.token_id for choice in choose_next(rows, ruled, NO_EOS)} == {4, 8}
    chosen = choose_next(rows, [ruled[0], *(sequence() for _ in range(199))], NO_EOS)
    assert {choice.token_id for choice in chosen[1:]} == {int(rows[0].argmax())}


def test_the_largest_uniform_number_draws_a_token_that_has_a_probability() -> None:
    class Highest(random.Random):
        def random(self) -> float:
            return 1.0 - 2.0**-53

    row = torch.full((1, VOCAB_SIZE), float("-inf"))
    row[0, [5, 9]] = torch.tensor([1.0, 0.0])
    asked = sequence(temperature=1.0)
    asked.rng = Highest()
    assert choose_next(row, [asked], NO_EOS)[0].token_id == 9


def test_a_seed_gives_the_same_draws_again() -> None:
    one, two = sequence(9, temperature=1.0), sequence(9, temperature=1.0)
    rows = [logits(seed=i) for i in range(20)]
    assert [choose_next(r, [one], NO_EOS) for r in rows] == [choose_next(r, [two], NO_EOS) for r in rows]


def test_end_tokens_are_not_eligible_before_min_new_tokens() -> None:
    row = torch.zeros(1, VOCAB_SIZE)
    row[0, EOS] = 10
    early, late = sequence(min_new_tokens=2), sequence(min_new_tokens=2)
    late.append(1)
    late.append(2)
    chosen = choose_next(row.expand(2, -1), [early, late], frozenset({EOS}))
    assert chosen[0].token_id != EOS
    assert chosen[1].token_id == EOS


def test_the_repetition_penalty_covers_input_and_output() -> None:
    row = torch.zeros(1, VOCAB_SIZE)
    row[0, 7], row[0, 8], row[0, 9] = 3.0, 2.9, 2.8
    asked = sequence(input_ids=(7,), repetition_penalty=2.0)
    assert choose_next(row, [asked], NO_EOS)[0].token_id == 8
    asked.append(8)
    assert choose_next(row, [asked], NO_EOS)[0].token_id == 9


def test_a_row_that_is_not_finite_chooses_nothing_and_leaves_the_others_alone() -> None:
    rows = logits(3)
    rows[1, 5] = float("nan")
    rules: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}]
    for sampling in rules:
        chosen = choose_next(rows, [sequence(**sampling) for _ in range(3)], NO_EOS)
        assert chosen[1].token_id is None
        assert chosen[0].token_id is not None
        assert chosen[2].token_id is not None


def test_logprobs_are_the_models_own_whatever_the_rules() -> None:
    row = logits()
    rules: list[dict[str, Any]] = [{}, {"temperature": 0.3, "top_k": 2, "repetition_penalty": 2.0}]
    for sampling in rules:
        choice = choose_next(row, [sequence(logprobs=True, **sampling)], NO_EOS)[0]
        assert choice.token_id is not None
        assert choice.logprob == pytest.approx(float(row.log_softmax(-1)[0, choice.token_id]), abs=1e-5)
    assert choose_next(row, [sequence()], NO_EOS)[0].logprob is None


def test_penalties_count_what_the_output_holds_and_nothing_else() -> None:
    row = torch.zeros(1, VOCAB_SIZE)
    row[0, [1, 2, 3]] = torch.tensor([5.0, 4.6, 4.0])
    asked = sequence(input_ids=(1, 1, 1), presence_penalty=1.0, frequency_penalty=0.25)
    chosen = []
    for _ in range(7):
        token = choose_next(row, [asked], NO_EOS)[0].token_id
        assert token is not None
        asked.append(token)
        chosen.append(token)
    # Once each they are at 3.75, 3.35 and 2.75; then the 1 falls to 3.5 and 3.25, the 2 to 3.1.
    assert chosen == [1, 2, 3, 1, 1, 2, 1]


def test_a_negative_penalty_invites_repetition() -> None:
    row = logits()
    second = int(row[0].topk(2).indices[1])
    asked = sequence(presence_penalty=-2.0)
    row[0, second] = row.max() - 1.0
    asked.append(second)
    assert choose_next(row, [asked], NO_EOS)[0].token_id == second


def test_a_bias_moves_its_tokens_alone() -> None:
    row = logits()
    best = int(row.argmax())
    least = int(row.argmin())
    pushed, banned = sequence(logit_bias=((least, 100.0),)), sequence(logit_bias=((best, -100.0),))
    tokens = [choice.token_id for choice in choose_next(row.expand(3, -1), [pushed, banned, sequence()], NO_EOS)]
    assert tokens == [least, int(row[0].topk(2).indices[1]), best]


def test_the_most_likely_tokens_are_told_under_the_models_own_distribution() -> None:
    rows = logits(3)
    asked = [
        sequence(logprobs=True, top_logprobs=4, logit_bias=((7, 50.0),)),
        sequence(logprobs=True),
        sequence(logprobs=True, top_logprobs=2),
    ]
    choices = choose_next(rows, asked, NO_EOS)
    expected = rows.log_softmax(-1)
    assert choices[0].token_id == 7
    assert [len(choice.top) for choice in choices] == [4, 0, 2]
    for choice, row in zip(choices, expected, strict=True):
        count = len(choice.top)
        assert choice.token_id is not None
        assert choice.logprob == pytest.approx(float(row[choice.token_id]), abs=1e-5)
        assert [candidate.id for candidate in choice.top] == row.topk(count or 1).indices.tolist()[:count]
        assert [c.logprob for c in choice.top] == pytest.approx(row.topk(count or 1).values.tolist()[:count], abs=1e-5)
