"""An evaluation from rows to a report, on an engine of its own: who is asked what, and what the figures come to."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.model.frozen import FrozenModel
from server.engine.text.model_text import ModelText
from server.errors import GenerationFailed, InvalidRequest, InvalidTrainingData
from server.evaluation.metrics import ACCURACY, EXACT_MATCH, GENERATED_ACCURACY, PERPLEXITY
from server.evaluation.standalone import OwnEngine, _answers, run
from server.evaluation.systems import (
    BASELINE_SLACK,
    RequestedBaselines,
    System,
    TeacherText,
    draw_examples,
    of_soft_prompt,
)
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.trainer import train
from tests.evaluation.support import chat_model, data_of, prepared, shots_of, soft_prompt_of
from tests.support import make_engine, random_soft_prompt, request, run_engine
from tests.train.rows import LEARNS, MOODS, TEMPLATE, examples_of, initial_values, work_of

TEXTS = tuple((text, "yes") for text in ("a", "two words", "x" * 60, "ünï", "b", "c d", "good", "last one"))
LABELS = ("no", "yes")


@pytest.fixture(scope="module")
def trained(tiny32: FrozenModel) -> SoftPrompt:
    """A soft prompt that answers MOODS."""
    examples = examples_of(tiny32)
    initial = initial_values(tiny32, LEARNS, None)
    assert isinstance(initial, torch.Tensor)
    embeddings = train(work_of(tiny32, initial, examples), LEARNS, 0.3).prompt_embeddings
    return SoftPrompt("PROMPT_TUNING", embeddings, soft_prompt_of(tiny32, labels=LABELS).manifest)


@pytest.fixture(scope="module")
def chat() -> FrozenModel:
    return chat_model()


def answers(model: FrozenModel, soft_prompt: SoftPrompt, pairs: Any = TEXTS) -> list[str]:
    """What is generated for rows."""
    engine, evaluation = prepared(model, data_of(pairs), soft_prompt)
    asked = [evaluation.questions.ask(evaluation.systems[0], row)[0] for row in evaluation.rows]
    outcomes = run_engine(engine, [(one.request, one.soft_prompt) for one in asked])
    return [outcomes[one.request.request_id].text for one in asked]


def test_a_taught_soft_prompt_is_right_by_choosing_and_by_generating(tiny32: FrozenModel, trained: SoftPrompt) -> None:
    engine, evaluation = prepared(tiny32, data_of(MOODS), trained)
    report = run(engine, evaluation)
    figures = report.scores["mood"].figures
    assert (figures[ACCURACY].value, figures[GENERATED_ACCURACY].value) == (1.0, 1.0)
    assert report.by_label == {"no": (2, 2), "yes": (2, 2)}
    engine.check_integrity()


def test_perplexity_is_transformers_own_of_the_same_tokens(tiny: FrozenModel) -> None:
    soft_prompt = soft_prompt_of(tiny)
    pairs = [("good", "a long answer"), ("bad", "none"), ("x", "ünï")]
    engine, evaluation = prepared(tiny, data_of(pairs), soft_prompt)
    total, tokens = 0.0, 0
    for text, target in pairs:
        inputs, targets = tiny.text.encode(f"{text}\n"), [*tiny.text.encode(target), min(tiny.eos_token_ids)]
        embedded = tiny.embed(torch.tensor(inputs + targets))
        embeddings = torch.cat([soft_prompt.tensor.to(tiny.dtype), embedded]).unsqueeze(0)
        ignored = [-100] * (soft_prompt.num_virtual_tokens + len(inputs))
        reference = tiny_reference()
        loss = reference(inputs_embeds=embeddings, labels=torch.tensor([ignored + targets])).loss
        total, tokens = total + float(loss.detach()) * len(targets), tokens + len(targets)
    found = run(engine, evaluation).scores["mood"].figures[PERPLEXITY].value
    assert found == pytest.approx(math.exp(total / tokens), rel=1e-6), "transformers casts logits to float32 for a loss"


def tiny_reference() -> Any:
    from tests.support import tiny_module

    return tiny_module(dtype=torch.float64, attention="eager")


def test_all_rows_at_once_are_answered_as_each_is_alone(tiny: FrozenModel) -> None:
    soft_prompt = soft_prompt_of(tiny, generation={"max_new_tokens": 12})
    alone = [
        run_engine(make_engine(tiny), [(request("one", tiny.text.encode(text + "\n"), max_new_tokens=12), soft_prompt)])
        for text, _ in TEXTS
    ]
    assert answers(tiny, soft_prompt) == [outcomes["one"].text for outcomes in alone]


def test_the_manifest_decides_template_and_generation(tiny: FrozenModel) -> None:
    plain = answers(tiny, soft_prompt_of(tiny, generation={"max_new_tokens": 8}))
    assert answers(tiny, soft_prompt_of(tiny, input_template="Q: {input}", generation={"max_new_tokens": 8})) != plain
    stop = next(character for character in plain[0][1:] if character.isascii() and character.isprintable())
    stopped = answers(tiny, soft_prompt_of(tiny, generation={"max_new_tokens": 8, "stop": [stop]}))
    assert stopped[0] == plain[0][: plain[0].index(stop)]


def test_special_tokens_in_a_row_are_text_for_whoever_answers(chat: FrozenModel) -> None:
    row = data_of([("hi<eos>", "yes")]).rows[0]
    host = OwnEngine(make_engine(chat))
    for system in (
        of_soft_prompt("mood", soft_prompt_of(chat)),
        System("1-shot", template=Manifest(input_template="{input}!"), preamble="a<eos>\n"),
        System("instruction", preamble="do<eos>\n\n", chat=True),
    ):
        assert chat.text.end_token_id not in system.read(row, host), system.name


def test_a_sampling_task_is_measured_reproducibly(tiny: FrozenModel) -> None:
    soft_prompt = soft_prompt_of(tiny, generation={"temperature": 2.0, "max_new_tokens": 8})
    same = [("same", "yes")] * 4
    assert answers(tiny, soft_prompt, same) == answers(tiny, soft_prompt, same)
    assert len(set(answers(tiny, soft_prompt, same))) == 4, "rows must not share their random numbers"


def test_the_default_length_gives_way_to_the_context_as_in_serving(tiny: FrozenModel) -> None:
    assert len(answers(tiny, random_soft_prompt(tiny.spec), [("x" * 110, "yes")])) == 1  # 128 new tokens, context 128


def test_a_row_that_does_not_fit_is_refused_by_file_and_line_before_anything_runs(tiny: FrozenModel) -> None:
    rows = data_of([("short", "yes"), ("x" * 125, "yes")])
    with pytest.raises(InvalidTrainingData, match=r"rows\.jsonl, line 2: .* the context holds 128.*\. Shorten or"):
        prepared(tiny, rows)


def test_a_row_that_could_never_fit_is_refused_before_it_is_tokenised(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelText, "encode", lambda *_, **__: pytest.fail("it was tokenised"))
    with pytest.raises(InvalidTrainingData, match=r"line 1: 1,000,003 characters can never fit"):
        prepared(tiny, data_of([("x" * 10**6, "yes")]))


def test_a_target_that_is_no_label_is_refused_by_line(tiny: FrozenModel) -> None:
    rows = data_of([("a", "yes"), ("b", "Yes")])
    with pytest.raises(
        InvalidTrainingData, match=r"rows\.jsonl, line 2: the target 'Yes' is none of the task's labels"
    ):
        prepared(tiny, rows, soft_prompt_of(tiny, labels=LABELS))


def test_a_row_that_the_engine_cannot_finish_is_an_error_with_its_line(tiny: FrozenModel) -> None:
    broken = SoftPrompt("PROMPT_TUNING", random_soft_prompt(tiny.spec).tensor.clone().fill_(float("inf")))
    engine, evaluation = prepared(tiny, data_of([("a", "b")]), broken)
    with pytest.raises(GenerationFailed, match=r"rows\.jsonl: Line 1 got no answer: .* not finite"):
        run(engine, evaluation)


def test_progress_counts_every_row_of_every_contestant_once(tiny: FrozenModel) -> None:
    engine, evaluation = prepared(
        tiny, data_of(MOODS), None, "zero-shot", "2-shot", shots=shots_of([("fast", "yes"), ("slow", "no")])
    )
    calls: Counter[str] = Counter()
    run(engine, evaluation, lambda name: calls.update([name]))
    assert calls == {"mood": 4, "zero-shot": 4, "2-shot": 4}
    assert evaluation.num_questions == 12


def read(model: FrozenModel, system: System, text: str = "good") -> str:
    return model.text.tokens.decode(system.read(data_of([(text, "yes")]).rows[0], OwnEngine(make_engine(model))))


def test_each_baseline_reads_what_it_is_named_after(chat: FrozenModel) -> None:
    shots = shots_of([("fine", "yes"), ("bad", "no"), ("poor", "no"), ("good", "yes")])
    data = data_of([("good", "yes")], instruction="Good?")
    _, evaluation = prepared(
        chat, data, soft_prompt_of(chat, labels=LABELS), "zero-shot", "instruction", "2-shot", shots=shots
    )
    mood, zero_shot, told, two_shot = evaluation.systems
    assert read(chat, mood) == read(chat, zero_shot) == "good\n"
    assert read(chat, told) == "[user]Good?\n\ngood[answer]"
    words = read(chat, two_shot)
    assert words.startswith("Good?\n\nInput: ")
    assert words.endswith("\n\nInput: good\nAnswer:\n")
    assert "Input: fine\nAnswer:\nyes\n\n" in words, "the row itself is no example, so only this one is a yes"
    assert all(one.soft_prompt is None for one in (zero_shot, told, two_shot))
    assert zero_shot.longest == len("yes") + BASELINE_SLACK


def test_words_that_all_rows_begin_with_are_computed_once_and_change_no_answer(chat: FrozenModel) -> None:
    data = data_of([("good", "yes"), ("bad", "no"), ("awful", "no")], instruction="Is it good?")
    ways = ("zero-shot", "instruction", "1-shot")
    engine, evaluation = prepared(chat, data, None, *ways, shots=shots_of([("fine", "yes")]))
    assert [one.shared is not None for one in evaluation.systems] == [False, False, True, True]
    apart = replace(evaluation, systems=tuple(replace(one, shared=None) for one in evaluation.systems))
    together, alone = run(engine, evaluation), run(make_engine(chat), apart)
    assert {name: score.figures for name, score in together.scores.items()} == {
        name: score.figures for name, score in alone.scores.items()
    }
    assert engine.prefixes.computed == 3, "the soft prompt's, the instruction's and the examples'"


def test_a_teacher_is_asked_in_its_own_words_and_agreement_counts_the_same_choice(chat: FrozenModel) -> None:
    data = data_of([("good", "yes"), ("bad", "no"), ("fine", "no")])
    soft_prompt = soft_prompt_of(chat, labels=LABELS)
    for is_chat, words in ((False, "Is 'good' good?\n"), (True, "[user]Is 'good' good?\n[answer]")):
        teacher = TeacherText("Is '{input}' good?\n", is_chat)
        engine, evaluation = prepared(chat, data, soft_prompt, teacher=teacher)
        shared = evaluation.systems[1].shared
        assert shared is not None
        rest = read(chat, evaluation.systems[1])
        assert shared.num_virtual_tokens + len(rest) == len(words)
        assert words.endswith(rest)
        report = run(engine, evaluation)
        chosen = [
            [answer.chosen for _, answer in sorted(_answers(make_engine(chat), evaluation, one, lambda name: None))]
            for one in evaluation.systems
        ]
        same = sum(one == two for one, two in zip(*chosen, strict=True))
        assert report.agreement["teacher"].value == pytest.approx(same / 3)
        assert report.as_dict()["contestants"]["teacher"]["agreement"]["value"] == pytest.approx(same / 3, abs=1e-4)
        assert "chooses the same label as teacher on" in report.agreement_sentence("teacher")
    with pytest.raises(InvalidRequest, match="exactly once"):
        prepared(chat, data, soft_prompt, teacher=TeacherText("Good?"))


def test_examples_are_even_over_labels_drawn_by_seed_and_never_evaluated() -> None:
    pairs = [(f"row {i}", "yes" if i % 5 else "no") for i in range(100)]
    shots, data = shots_of(pairs), data_of(pairs[:50])
    drawn = draw_examples(shots, data, 8, LABELS, 0)
    assert Counter(row.target for row in drawn) == {"yes": 4, "no": 4}
    assert all(row.line > 50 for row in drawn)
    assert draw_examples(shots, data, 8, LABELS, 0) == drawn
    assert draw_examples(shots, data, 8, LABELS, 1) != drawn
    with pytest.raises(InvalidTrainingData, match=r"has 50 rows that are not evaluated; 51-shot needs 51"):
        draw_examples(shots, data, 51, None, 0)


def test_a_baseline_without_what_it_needs_is_refused(tiny: FrozenModel) -> None:
    with pytest.raises(InvalidRequest, match="needs an instruction"):
        prepared(tiny, data_of(MOODS), None, "instruction")
    with pytest.raises(InvalidRequest, match=r"tiny-llama cannot be asked .* no chat template.*Leave it out"):
        prepared(tiny, data_of(MOODS), None, "instruction", instruction="Good?")
    with pytest.raises(InvalidRequest, match="4-shot needs training data"):
        prepared(tiny, data_of(MOODS), None, "4-shot")


@pytest.mark.parametrize("name", ["zeroshot", "0-shot", "257-shot", "-1", "@0", "", "shot"])
def test_a_baseline_that_there_is_not_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"There is no baseline.*zero-shot, instruction, 4-shot"):
        RequestedBaselines.parse([name])


def test_a_clearly_better_version_is_better_and_an_identical_one_is_not(
    tiny32: FrozenModel, trained: SoftPrompt
) -> None:
    rows = data_of(MOODS * 6)
    poor = soft_prompt_of(tiny32, labels=LABELS)
    engine, evaluation = prepared(tiny32, rows, trained, others=[("mood@1", poor), ("mood@2", trained)])
    report = run(engine, evaluation)
    assert report.verdict("mood@1") == "better"
    assert report.verdict("mood@2") == "no difference shown"
    assert "is better than mood@1: accuracy +" in report.sentence("mood@1")
    assert report.sentence("mood@2").startswith("no difference shown between mood and mood@2: accuracy +0.0 points")
    engine, evaluation = prepared(tiny32, rows, poor, others=[("mood@1", trained)])
    assert run(engine, evaluation).verdict("mood@1") == "worse"


def test_a_smaller_perplexity_is_better(tiny32: FrozenModel, trained: SoftPrompt) -> None:
    rows = data_of(
        [(f"{text} {i}", target) for i in range(5) for text, target in (("good", f"yes {i}"), ("bad", "no"))]
    )
    taught = SoftPrompt("PROMPT_TUNING", trained.tensor, soft_prompt_of(tiny32).manifest)
    engine, evaluation = prepared(tiny32, rows, taught, others=[("mood@1", soft_prompt_of(tiny32))])
    report = run(engine, evaluation)
    assert report.scores["mood"].figures[PERPLEXITY].value < report.scores["mood@1"].figures[PERPLEXITY].value
    assert report.verdict("mood@1", PERPLEXITY) == "better"
    assert set(report.metrics) > {EXACT_MATCH}


def test_a_report_is_json_with_everything_that_it_rests_on(tiny32: FrozenModel, trained: SoftPrompt) -> None:
    engine, evaluation = prepared(tiny32, data_of(MOODS), trained, "zero-shot")
    figures = json.loads(json.dumps(run(engine, evaluation).as_dict()))
    assert (figures["task"], figures["model"], figures["rows"], figures["kind"]) == (
        *("mood", "tiny-llama", 4),
        "classification",
    )
    assert figures["digest"] == trained.digest
    assert figures["contestants"]["mood"]["accuracy_choices"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert set(figures["contestants"]["zero-shot"]["difference"]["accuracy_choices"]) == {
        "value",
        "interval",
        "verdict",
    }
    assert figures["labels"] == {"no": {"correct": 2, "rows": 2}, "yes": {"correct": 2, "rows": 2}}
    assert figures["intervals"]["resamples"] == 1000
    assert TEMPLATE == "{input}\n"
