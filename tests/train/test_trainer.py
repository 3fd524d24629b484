from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from server.engine.model import FrozenModel, weights_hash
from server.errors import InvalidTrainingData
from server.train.data import Example
from server.train.initial import initial_embeddings
from server.train.trainer import (
    Progress,
    TrainingConfig,
    TrainingResult,
    _batches,
    _learning_rate_factor,
    batch_loss,
    evaluate_teacher_forced,
    train,
)
from tests.support import make_engine, random_soft_prompt, request, run_engine, tiny_model, tiny_module
from tests.train.rows import LEARNS, MOODS, examples_of, random_embeddings

# Beyond the windows of 8, and with less padding than that: a padding token that sees nothing but padding is NaN in
# transformers' eager attention, because the mask's float64 minimum overflows in its float32 softmax.
PADDED = (("a sentence", "b"), ("an input", "x"), ("what", "its answer"))
UNEVEN = (("a", "b"), ("a longer input, far beyond any window", "x"), ("ab", "a longer target too"), ("c", "d"))


def run(model: FrozenModel, config: TrainingConfig) -> tuple[TrainingResult, list[Progress]]:
    """Train on MOODS."""
    progress: list[Progress] = []
    initial = initial_embeddings(model, "vocab", config.num_virtual_tokens, config.seed, text=None, labels=None)
    examples = examples_of(model)
    return train(model, initial, examples, examples, config, progress.append), progress


def test_training_teaches_a_frozen_random_model_a_task(tiny32: FrozenModel) -> None:
    result, progress = run(tiny32, LEARNS)
    assert [p.step for p in progress] == list(range(1, LEARNS.steps + 1))
    assert progress[-1].loss < 0.2 * progress[0].loss
    assert result.validation.exact_match == 1.0
    assert evaluate_teacher_forced(tiny32, result.prompt_embeddings, examples_of(tiny32)) == result.validation


def test_the_same_seed_gives_the_same_soft_prompt_bit_for_bit(tiny32: FrozenModel) -> None:
    config = replace(LEARNS, steps=12, batch_size=3)
    first, again = run(tiny32, config)[0], run(tiny32, config)[0]
    other = run(tiny32, replace(config, seed=1))[0]
    assert torch.equal(first.prompt_embeddings, again.prompt_embeddings)
    assert first.validation == again.validation
    assert not torch.equal(first.prompt_embeddings, other.prompt_embeddings)


def test_training_writes_to_no_weight_and_leaves_no_gradient() -> None:
    model = tiny_model(dtype=torch.float32)
    before = weights_hash(model.module)
    initial = random_embeddings(model)
    kept = initial.clone()
    result = train(model, initial, examples_of(model), examples_of(model), replace(LEARNS, steps=5))
    assert weights_hash(model.module) == before
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())
    assert torch.equal(initial, kept)
    assert not torch.equal(result.prompt_embeddings, kept)


def test_the_best_measured_state_is_kept_not_the_last(tiny32: FrozenModel) -> None:
    taught = run(tiny32, LEARNS)[0].prompt_embeddings
    opposite = examples_of(tiny32, [(text, "no" if target == "yes" else "yes") for text, target in MOODS])
    progress: list[Progress] = []
    config = replace(LEARNS, steps=30, evaluations=10)
    result = train(tiny32, taught, opposite, examples_of(tiny32), config, progress.append)
    measured = {p.step: p.validation for p in progress if p.validation}
    assert sorted(measured) == list(range(3, 31, 3))
    best = max(measured, key=lambda step: (measured[step].exact_match, -measured[step].loss))
    assert best < 30
    assert (result.step, result.validation) == (best, measured[best])
    assert evaluate_teacher_forced(tiny32, result.prompt_embeddings, examples_of(tiny32)) == measured[best]


def test_the_last_step_is_measured_even_where_evaluations_do_not_divide_the_steps(tiny32: FrozenModel) -> None:
    _, progress = run(tiny32, replace(LEARNS, steps=7, evaluations=3))
    assert [p.step for p in progress if p.validation] == [2, 5, 7]


def test_teacher_forced_exact_match_is_what_greedy_decoding_answers(tiny: FrozenModel) -> None:
    soft_prompt = random_soft_prompt(tiny.spec)
    inputs = [tuple(tiny.encode(text)) for text in ("good", "a much longer text", "x")]
    requests = [(request(str(i), ids, max_new_tokens=6), soft_prompt) for i, ids in enumerate(inputs)]
    outcomes = run_engine(make_engine(tiny), requests)
    answered = [Example(ids, tuple(outcomes[str(i)].token_ids)) for i, ids in enumerate(inputs)]
    assert evaluate_teacher_forced(tiny, soft_prompt.tensor, answered).exact_match == 1.0
    for position in range(6):  # one other token anywhere in the first target, and only the two others match
        first = list(answered[0].target_ids)
        first[position] = (first[position] + 1) % 256
        changed = [replace(answered[0], target_ids=tuple(first)), *answered[1:]]
        assert evaluate_teacher_forced(tiny, soft_prompt.tensor, changed).exact_match == pytest.approx(2 / 3)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_row_has_the_same_loss_alone_and_in_a_flat_row_of_many(architecture: str) -> None:
    model = tiny_model(architecture)
    examples = examples_of(model, UNEVEN)
    embeddings = random_embeddings(model)
    together = batch_loss(model, embeddings, examples)
    alone = [batch_loss(model, embeddings, [example]) for example in examples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    assert len(together) == sum(len(example.target_ids) for example in examples)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_score_does_not_depend_on_how_rows_are_batched(tiny: FrozenModel, batch_size: int) -> None:
    examples, embeddings = examples_of(tiny, UNEVEN), random_embeddings(tiny)
    score = evaluate_teacher_forced(tiny, embeddings, examples, batch_size)
    assert score.loss == pytest.approx(float(batch_loss(tiny, embeddings, examples).mean()), rel=1e-12)


def padded_loss(module: PreTrainedModel, embeddings: torch.Tensor, examples: list[Example]) -> torch.Tensor:
    """The same mean loss by transformers alone: right padding, an attention mask, labels of -100."""
    n, longest = len(embeddings), max(len(example.fed_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), n + longest, dtype=torch.long)
    labels = torch.full((len(examples), n + longest), -100)
    for i, example in enumerate(examples):
        length = len(example.fed_ids)
        ids[i, :length] = torch.tensor(example.fed_ids)
        mask[i, : n + length] = 1
        labels[i, n + length - len(example.target_ids) : n + length] = torch.tensor(example.target_ids)
    tokens = module.get_input_embeddings()(ids)
    inputs = torch.cat([embeddings.to(tokens.dtype).expand(len(examples), -1, -1), tokens], dim=1)
    logits = module(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize(
    ("architecture", "attention", "precision"),
    [
        ("llama", "sdpa", 1e-10),
        ("llama", "eager", 1e-6),  # most eager attentions take the softmax in float32
        ("gemma2", "eager", 1e-6),
        ("mistral", "eager", 1e-6),
        ("gpt2", "eager", 1e-10),
    ],
)
def test_the_gradient_is_that_of_transformers_own_attention_with_padding_and_masks(
    architecture: str, attention: str, precision: float
) -> None:
    model = tiny_model(architecture)
    examples = examples_of(model, PADDED)
    ours = random_embeddings(model).double().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss = batch_loss(model, ours, examples).mean()
    reference = padded_loss(tiny_module(architecture, attention=attention), theirs, examples)
    torch.testing.assert_close(loss, reference, rtol=precision, atol=precision)
    [gradient] = torch.autograd.grad(loss, ours)
    [expected] = torch.autograd.grad(reference, theirs)
    torch.testing.assert_close(gradient, expected, rtol=10 * precision, atol=precision)
    assert float(expected.abs().max()) > 1e-2


def test_every_row_is_seen_once_before_any_comes_again(tiny: FrozenModel) -> None:
    examples = examples_of(tiny, [(f"row {i}", "x") for i in range(10)])
    batches = list(itertools.islice(_batches(examples, 4, seed=0), 5))
    assert [len(batch) for batch in batches] == [4] * 5
    seen = [example for batch in batches for example in batch]
    assert set(seen[:10]) == set(seen[10:]) == set(examples)
    assert seen[:10] != seen[10:]


def test_a_batch_may_be_larger_than_the_data(tiny: FrozenModel) -> None:
    examples = examples_of(tiny, MOODS[:2])
    batch = next(_batches(examples, 5, seed=0))
    assert {batch.count(example) for example in examples} == {2, 3}


def test_the_learning_rate_warms_up_to_its_peak_and_then_falls_towards_zero() -> None:
    factors = [_learning_rate_factor(step, TrainingConfig(steps=100, warmup_ratio=0.1)) for step in range(100)]
    assert factors[:11] == pytest.approx([0.1 * i for i in range(1, 11)] + [1.0])
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.02


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step_with_a_remedy(tiny32: FrozenModel) -> None:
    initial = random_embeddings(tiny32).fill_(float("inf"))
    examples = examples_of(tiny32)
    with pytest.raises(InvalidTrainingData, match=r"The loss is nan at step 1\. Lower the learning rate"):
        train(tiny32, initial, examples, examples, replace(LEARNS, steps=3))
