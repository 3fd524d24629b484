from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import Example
from server.train.forward import key_values_of, rows_logits, target_logits
from server.train.methods import LearnedPrefix, PrefixTuning, join_key_values
from server.train.objectives import Targets
from server.train.run_history import TeacherForcedScore
from server.train.trainer import measure
from tests.support import HYBRIDS, make_engine, random_soft_prompt, request, run_engine, tiny_model, tiny_module
from tests.train.rows import examples_of, lessons_of, random_embeddings

# Beyond the windows of 8, and with less padding than that: a padding token that sees nothing but padding is NaN in
# transformers' eager attention, because the mask's float64 minimum overflows in its float32 softmax.
PADDED = (("a sentence", "b"), ("an input", "x"), ("what", "its answer"))
UNEVEN = (("a", "b"), ("a longer input, far beyond any window", "x"), ("ab", "a longer target too"), ("c", "d"))


class Given(LearnedPrefix):
    """Virtual tokens in any precision."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self._embeddings = embeddings

    def virtual_tokens(self, task: int) -> torch.Tensor:
        return self._embeddings

    def saved(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self._embeddings}


def losses(model: FrozenModel, embeddings: torch.Tensor, examples: list[Example]) -> torch.Tensor:
    """Cross-entropy of every target token."""
    logits, targets = target_logits(model, Given(embeddings), examples)
    return Targets().losses(logits, targets, lessons_of(examples))


def score(model: FrozenModel, embeddings: torch.Tensor, examples: list[Example]) -> TeacherForcedScore:
    """Measured as training does it."""
    return measure(model, Given(embeddings), Targets(), lessons_of(examples))


@pytest.mark.parametrize("architecture", ["llama", *HYBRIDS])
def test_teacher_forced_exact_match_is_what_greedy_decoding_answers(architecture: str) -> None:
    tiny = tiny_model(architecture)
    soft_prompt = random_soft_prompt(tiny.spec)
    inputs = [tuple(tiny.text.encode(text)) for text in ("good", "a much longer text", "x")]
    requests = [(request(str(i), ids, max_new_tokens=6), soft_prompt) for i, ids in enumerate(inputs)]
    outcomes = run_engine(make_engine(tiny), requests)
    answered = [Example(ids, tuple(outcomes[str(i)].token_ids)) for i, ids in enumerate(inputs)]
    assert score(tiny, soft_prompt.tensor, answered).exact_match == 1.0
    for position in range(6):  # one other token anywhere in the first target, and only the two others match
        first = list(answered[0].target_ids)
        first[position] = (first[position] + 1) % 256
        changed = [replace(answered[0], target_ids=tuple(first)), *answered[1:]]
        assert score(tiny, soft_prompt.tensor, changed).exact_match == pytest.approx(2 / 3)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "lfm2"])
def test_a_row_has_the_same_loss_alone_and_in_a_flat_row_of_many(architecture: str) -> None:
    model = tiny_model(architecture)
    examples = examples_of(model, UNEVEN)
    embeddings = random_embeddings(model)
    together = losses(model, embeddings, examples)
    alone = [losses(model, embeddings, [example]) for example in examples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    assert len(together) == sum(len(example.target_ids) for example in examples)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", *HYBRIDS])
def test_virtual_tokens_that_rows_share_are_computed_once_with_the_losses_and_gradients_of_each_row(
    architecture: str,
) -> None:
    model = tiny_model(architecture)
    examples = examples_of(model, UNEVEN)
    found = []
    for in_each_row in (False, True):
        embeddings = random_embeddings(model).double().requires_grad_()
        logits, targets = rows_logits(model, examples, [embeddings] * len(examples) if in_each_row else embeddings)
        loss = F.cross_entropy(logits, targets)
        found.append((logits, *torch.autograd.grad(loss, embeddings)))
    for shared, apart in zip(*found, strict=True):
        precision = 1e-4 if architecture == "qwen3_5_text" else 1e-6  # its linear attention computes in float32
        torch.testing.assert_close(shared, apart, rtol=precision, atol=precision / 10)  # rotary angles: see below


def test_the_score_does_not_depend_on_how_rows_are_batched(tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, embeddings = examples_of(tiny, UNEVEN), random_embeddings(tiny)
    for size in (1, 3, 32):
        monkeypatch.setattr("server.train.trainer.MEASURED_TOGETHER", size)
        expected = float(losses(tiny, embeddings, examples).mean())
        assert score(tiny, embeddings, examples).loss == pytest.approx(expected, rel=1e-12)


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
        ("llama", "sdpa", 1e-7),  # rotary angles are float32, and the last digit of a cosine depends on its place
        ("llama", "eager", 1e-6),  # most eager attentions take the softmax in float32
        ("gemma2", "eager", 1e-6),
        ("mistral", "eager", 1e-6),
        ("gpt2", "eager", 1e-10),
        ("lfm2", "eager", 1e-6),
        ("qwen3_5_text", "eager", 1e-5),
    ],
)
def test_the_gradient_is_that_of_transformers_own_attention_with_padding_and_masks(
    architecture: str, attention: str, precision: float
) -> None:
    model = tiny_model(architecture)
    examples = examples_of(model, PADDED)
    ours = random_embeddings(model).double().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss = losses(model, ours, examples).mean()
    reference = padded_loss(tiny_module(architecture, attention=attention), theirs, examples)
    torch.testing.assert_close(loss, reference, rtol=precision, atol=precision)
    [gradient] = torch.autograd.grad(loss, ours)
    [expected] = torch.autograd.grad(reference, theirs)
    torch.testing.assert_close(gradient, expected, rtol=10 * precision, atol=precision)
    assert float(expected.abs().max()) > 5e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_rows_behind_the_keys_and_values_of_a_text_are_rows_behind_the_text(architecture: str) -> None:
    model = tiny_model(architecture)
    text = tuple(model.text.encode("a text, and longer than windows"))
    examples = examples_of(model, UNEVEN)
    whole = [replace(example, input_ids=text + example.input_ids) for example in examples]
    behind = rows_logits(model, examples, key_values=key_values_of(model, text))[0]
    torch.testing.assert_close(behind, rows_logits(model, whole)[0], rtol=1e-12, atol=1e-12)


def test_a_learned_prefix_is_served_as_it_was_trained(tiny: FrozenModel) -> None:
    states = tuple((torch.randn_like(key), torch.randn_like(value)) for key, value in key_values_of(tiny, (1, 2, 3)))
    prefix = PrefixTuning(tuple((key.float(), value.float()) for key, value in states))
    served = SoftPrompt("PREFIX_TUNING", prefix.saved()["prompt_embeddings"])
    ids = tuple(tiny.text.encode("good"))
    outcome = run_engine(make_engine(tiny), [(request("a", ids, max_new_tokens=6), served)])["a"]
    answered = Example(ids, tuple(outcome.token_ids))
    assert measure(tiny, prefix, Targets(), lessons_of([answered])).exact_match == 1.0
    changed = replace(answered, target_ids=(*answered.target_ids[:-1], (answered.target_ids[-1] + 1) % 256))
    assert measure(tiny, prefix, Targets(), lessons_of([changed])).exact_match == 0.0
    assert torch.equal(join_key_values(prefix.key_values()), served.tensor)


def test_gradients_reach_keys_and_values(tiny32: FrozenModel) -> None:
    prefix = PrefixTuning(key_values_of(tiny32, (1, 2, 3)))
    logits, targets = target_logits(tiny32, prefix, examples_of(tiny32))
    Targets().losses(logits, targets, lessons_of(examples_of(tiny32))).mean().backward()  # type: ignore[no-untyped-call]
    assert prefix.states.grad is not None
    assert (prefix.states.grad.flatten(1).abs().amax(dim=1) > 0).all(), "of every layer"
