from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from server.engine.model import FrozenModel
from server.errors import ConfigurationError, GenerationFailed, InvalidTrainingData
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.evaluate import BASELINE_SLACK, counts_as_baseline, evaluate_baseline, evaluate_task
from server.train.initial import initial_values
from server.train.trainer import train
from tests.support import byte_tokenizer, make_engine, random_soft_prompt, request, run_engine, tiny_module
from tests.train.rows import LEARNS, MOODS, TEMPLATE, data_of, examples_of, random_embeddings, work_of

TEXTS = tuple((text, "yes") for text in ("a", "two words", "x" * 60, "ünï", "b", "c d", "good", "last one"))
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tiny32: FrozenModel) -> SoftPrompt:
    """A soft prompt that answers MOODS."""
    examples = examples_of(tiny32)
    initial = initial_values(tiny32, LEARNS, None)
    assert isinstance(initial, torch.Tensor)
    embeddings = train(work_of(tiny32, initial, examples), LEARNS, 0.3).prompt_embeddings
    return SoftPrompt("PROMPT_TUNING", embeddings, manifest(max_new_tokens=4))


@pytest.fixture(scope="module")
def chat() -> FrozenModel:
    """A tiny model that can be asked as a chat model is."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    module = tiny_module(dtype=torch.float64, attention="prelude")
    return FrozenModel(module, tokenizer, name="tiny-chat", max_model_len=128)


def manifest(**generation: Any) -> Manifest:
    return Manifest.model_validate({"input_template": TEMPLATE, "generation": generation})


def test_a_taught_soft_prompt_answers_its_rows_through_the_engine(tiny32: FrozenModel, trained: SoftPrompt) -> None:
    result = evaluate_task(make_engine(tiny32), trained, data_of(MOODS))
    assert [answer.text for answer in result.answers] == ["yes", "yes", "no", "no"]
    assert (result.exact_match, result.correct) == (1.0, 4)
    assert result.seconds > 0


def test_only_the_target_itself_counts_but_for_white_space_around_it(tiny32: FrozenModel, trained: SoftPrompt) -> None:
    rows = (("good", " yes\n"), ("fine", "Yes"), ("bad", "no."), ("poor", "n"))
    result = evaluate_task(make_engine(tiny32), trained, data_of(rows))
    assert [answer.correct for answer in result.answers] == [True, False, False, False]
    assert result.exact_match == 0.25


def test_all_rows_at_once_are_answered_as_each_is_alone(tiny: FrozenModel) -> None:
    soft_prompt = random_soft_prompt(tiny.spec, manifest=manifest(max_new_tokens=12).model_dump())
    together = evaluate_task(make_engine(tiny, max_sequences=4), soft_prompt, data_of(TEXTS))
    alone = [
        run_engine(make_engine(tiny), [(request("one", tiny.encode(text + "\n"), max_new_tokens=12), soft_prompt)])
        for text, _ in TEXTS
    ]
    assert [answer.text for answer in together.answers] == [outcomes["one"].text for outcomes in alone]
    assert [answer.row.input for answer in together.answers] == [text for text, _ in TEXTS]
    assert len({answer.text for answer in together.answers}) > 2


def test_the_manifest_decides_template_and_generation(tiny: FrozenModel) -> None:
    def texts(**fields: Any) -> list[str]:
        soft_prompt = random_soft_prompt(tiny.spec, manifest=fields)
        return [answer.text for answer in evaluate_task(make_engine(tiny), soft_prompt, data_of(TEXTS)).answers]

    plain = texts(generation={"max_new_tokens": 8})
    assert texts(input_template="Q: {input}", generation={"max_new_tokens": 8}) != plain
    stop = next(character for character in plain[0][1:] if character.isascii() and character.isprintable())
    assert texts(generation={"max_new_tokens": 8, "stop": [stop]})[0] == plain[0][: plain[0].index(stop)]


def test_a_sampling_task_is_measured_reproducibly(tiny: FrozenModel) -> None:
    soft_prompt = random_soft_prompt(tiny.spec, manifest={"generation": {"temperature": 2.0, "max_new_tokens": 8}})
    same = data_of([("same", "yes")] * 4)
    first, again = (evaluate_task(make_engine(tiny), soft_prompt, same).answers for _ in range(2))
    assert first == again
    assert len({answer.text for answer in first}) == 4, "rows must not share their random numbers"


def test_the_default_length_gives_way_to_the_context_as_in_serving(tiny: FrozenModel) -> None:
    soft_prompt = random_soft_prompt(tiny.spec)  # 128 new tokens by default, in a context of 128
    result = evaluate_task(make_engine(tiny), soft_prompt, data_of([("x" * 120, "yes")]))
    assert len(result.answers) == 1


def test_a_row_that_does_not_fit_is_refused_by_file_and_line_before_anything_is_generated(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    rows = data_of([("short", "yes"), ("x" * 125, "yes")])
    with pytest.raises(InvalidTrainingData, match=r"rows\.jsonl, line 2: .* the context holds 128\. Shorten or leave"):
        evaluate_task(engine, random_soft_prompt(tiny.spec), rows)
    assert engine.steps == 0
    assert not engine.has_work


def test_a_row_that_the_engine_cannot_finish_is_an_error_with_its_line(tiny: FrozenModel) -> None:
    broken = SoftPrompt("PROMPT_TUNING", random_embeddings(tiny).fill_(float("inf")))
    with pytest.raises(GenerationFailed, match=r"rows\.jsonl, line 1: .* not finite"):
        evaluate_task(make_engine(tiny), broken, data_of(MOODS))


def test_progress_counts_every_row_once(tiny32: FrozenModel, trained: SoftPrompt) -> None:
    calls: list[None] = []
    evaluate_task(make_engine(tiny32), trained, data_of(MOODS), lambda: calls.append(None))
    assert len(calls) == len(MOODS)


def test_figures_are_told_by_label_and_as_json(tiny32: FrozenModel, trained: SoftPrompt) -> None:
    rows = (*MOODS, ("good", "no"))
    result = evaluate_task(make_engine(tiny32), trained, data_of(rows))
    assert result.by_label(["no", "yes", "never"]) == {"no": (2, 3), "yes": (2, 2)}
    figures = json.loads(json.dumps(result.as_dict(["no"])))
    assert (figures["rows"], figures["correct"], figures["exact_match"]) == (5, 4, 0.8)
    assert figures["labels"] == {"no": {"correct": 2, "rows": 3}}
    assert set(figures) == {"rows", "correct", "exact_match", "seconds", "requests_per_second", "labels"}


def test_the_baseline_is_the_frozen_model_alone_asked_in_its_chat_template(chat: FrozenModel) -> None:
    result = evaluate_baseline(make_engine(chat), "Good?", data_of(MOODS))
    longest = len("yes") + BASELINE_SLACK
    asked = [
        (request(str(i), chat.encode(f"[user]Good?\n\n{text}[answer]"), max_new_tokens=longest), None)
        for i, (text, _) in enumerate(MOODS)
    ]
    outcomes = run_engine(make_engine(chat), asked)
    assert [answer.text for answer in result.answers] == [outcomes[str(i)].text for i in range(len(MOODS))]
    assert result.exact_match == 0.0


def test_a_baseline_needs_a_chat_template(tiny: FrozenModel) -> None:
    with pytest.raises(ConfigurationError, match=r"tiny-llama has no chat template, .* Leave the baseline out"):
        evaluate_baseline(make_engine(tiny), "Good?", data_of(MOODS))


@pytest.mark.parametrize(
    ("text", "target", "counts"),
    [
        ("spam", "spam", True),
        ("Spam.", "spam", True),
        ("\n **Spam!** \nBecause it asks for money.", "spam", True),
        ('"ham"', "Ham", True),
        ("yes", "Yes.", True),
        ("It is spam", "spam", False),
        ("spam or ham", "spam", False),
        ("I cannot say.\nspam", "spam", False),
        ("cardarrival", "card_arrival", False),
        ("", "spam", False),
        ("...", "spam", False),
        ("...", "!", False),
        ("!", "!", True),
    ],
)
def test_a_baseline_answer_counts_by_its_first_line_without_case_and_punctuation(
    text: str, target: str, counts: bool
) -> None:
    assert counts_as_baseline(text, target) is counts
