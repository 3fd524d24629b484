from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from server.engine.model.frozen import FrozenModel
from server.errors import ConfigurationError, InvalidTrainingData
from server.train.config import TrainingConfig
from server.train.data import DataFile, Example
from server.train.distil import KEPT_TOKENS, distilled_lessons, teacher_ids, text_states
from server.train.forward import rows_logits
from server.train.inputs import TaskFiles
from server.train.methods import PrefixTuning, PromptTuning
from server.train.objectives import Lesson, TeacherLabels, TeacherTokens
from server.train.train_task import train_task
from server.train.trainer import TrainingProblem, measure, train
from tests.support import EOS, byte_tokenizer, make_engine, request, run_engine, tiny_model, tiny_module
from tests.train.rows import LEARNS, data_of, initial_values, random_embeddings

TEACHER = "Say what you think of it: {input}\nAnswer:"
CONFIG = TrainingConfig(teacher_template=TEACHER, num_virtual_tokens=20)
INPUTS = data_of([(text, "-") for text in ("good", "fine weather", "bad", "poor")])


def lessons(model: FrozenModel, config: TrainingConfig = CONFIG, data: DataFile = INPUTS) -> list[Lesson]:
    students = [tuple(model.text.encode(f"{row.input}\n")) for row in data.rows]
    return distilled_lessons(model, config, data, students, 5)


def test_the_teacher_answers_as_the_engine_serves_its_whole_text(tiny: FrozenModel) -> None:
    asked = {row.input: tuple(tiny.text.encode(TEACHER.replace("{input}", row.input))) for row in INPUTS.rows}
    served = run_engine(make_engine(tiny), [(request(t, ids, max_new_tokens=5), None) for t, ids in asked.items()])
    for row, lesson in zip(INPUTS.rows, lessons(tiny), strict=True):
        [example] = lesson.examples
        assert list(example.target_ids) == served[row.input].token_ids
        assert example.input_ids == tuple(tiny.text.encode(f"{row.input}\n")), "the student reads its own text"


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_the_teachers_distributions_are_those_behind_its_whole_text(architecture: str) -> None:
    tiny = tiny_model(architecture)
    for row, lesson in zip(INPUTS.rows, lessons(tiny), strict=True):
        whole = Example(tuple(tiny.text.encode(TEACHER.replace("{input}", row.input))), lesson.examples[0].target_ids)
        expected = F.log_softmax(rows_logits(tiny, [whole])[0], dim=-1)
        assert lesson.tokens is not None
        torch.testing.assert_close(lesson.tokens.logprobs, expected.gather(1, lesson.tokens.ids), rtol=1e-9, atol=1e-9)
        assert lesson.tokens.ids.shape[1] == KEPT_TOKENS
        assert torch.equal(lesson.tokens.ids[:, 0], expected.argmax(dim=-1))


def test_a_student_that_thinks_as_its_teacher_has_no_loss(tiny: FrozenModel) -> None:
    taught = lessons(tiny)
    whole = [
        Example(tuple(tiny.text.encode(TEACHER.replace("{input}", row.input))), lesson.examples[0].target_ids)
        for row, lesson in zip(INPUTS.rows, taught, strict=True)
    ]
    logits, targets = rows_logits(tiny, whole)
    losses = TeacherTokens().losses(logits, targets, taught)
    assert float(losses.abs().max()) < 1e-9
    assert float(TeacherTokens().losses(logits.roll(1, dims=1), targets, taught).min()) > 0
    assert TeacherTokens().hits(logits, targets, taught) == len(taught)


def test_labels_are_judged_as_whole_texts(tiny: FrozenModel) -> None:
    labels = ("yes", "no", "perhaps")
    taught = lessons(tiny, replace(CONFIG, labels=labels))
    for row, lesson in zip(INPUTS.rows, taught, strict=True):
        ids = tuple(tiny.text.encode(TEACHER.replace("{input}", row.input)))
        totals = []
        for label in labels:
            logits, targets = rows_logits(tiny, [Example(ids, tuple(tiny.text.encode(label)))])
            totals.append(-F.cross_entropy(logits, targets, reduction="sum"))
        assert lesson.labels is not None
        torch.testing.assert_close(lesson.labels, F.log_softmax(torch.stack(totals), dim=0))
        assert [example.target_ids for example in lesson.examples] == [
            tuple(tiny.text.encode(label)) for label in labels
        ]


@pytest.mark.parametrize("labels", [None, ("yes", "no")])
def test_a_soft_prompt_learns_to_have_the_effect_of_a_text(tiny32: FrozenModel, labels: tuple[str, ...] | None) -> None:
    config = replace(LEARNS, teacher_template=TEACHER, labels=labels, steps=80)
    taught = lessons(tiny32, config)
    objective = TeacherLabels() if labels else TeacherTokens()
    prefix = PromptTuning(random_embeddings(tiny32, 20))
    before = measure(tiny32, prefix, objective, taught)
    result = train(TrainingProblem(tiny32, prefix, objective, taught, taught), config, 0.3)
    assert result.validation.loss < 0.2 * before.loss
    assert result.validation.exact_match >= before.exact_match


LONG = "You read what people write about the weather and say what you think of it. Here it is: {input}\nAnswer:"


@pytest.mark.parametrize("count", [None, 20])
def test_a_student_that_begins_as_its_teacher_begins_with_its_effect(tiny32: FrozenModel, count: int | None) -> None:
    """As many virtual tokens as the teacher's text has before the input are that text, wherever they stand."""
    shared = len(tiny32.text.encode(LONG.partition("{input}")[0]))
    config = TrainingConfig(
        method="prefix_tuning", num_virtual_tokens=count or shared, teacher_template=LONG, labels=("yes", "no")
    )
    assert config.may_begin_as_teacher
    students = [tuple(tiny32.text.encode(f"{row.input}\nAnswer:")) for row in INPUTS.rows]
    taught = distilled_lessons(tiny32, config, INPUTS, students, 5)
    ids = teacher_ids(tiny32, config, INPUTS)
    assert ids is not None
    states = text_states(tiny32, ids, config.num_virtual_tokens)
    assert {key.shape[1] for key, _ in states} == {config.num_virtual_tokens}
    begun = measure(tiny32, PrefixTuning(states), TeacherLabels(), taught)
    if count is None:
        assert begun.loss < 1e-6
        assert begun.exact_match == 1.0
    else:
        words = initial_values(tiny32, replace(config, init="vocab"), None)
        assert isinstance(words, tuple)
        assert begun.loss < measure(tiny32, PrefixTuning(words), TeacherLabels(), taught).loss


def test_a_teacher_that_says_less_than_the_student_is_no_beginning(tiny32: FrozenModel) -> None:
    config = TrainingConfig(method="prefix_tuning", num_virtual_tokens=100, teacher_template=TEACHER)
    assert teacher_ids(tiny32, config, INPUTS) is None
    with pytest.raises(InvalidTrainingData, match=r"its texts have \d+ in common\. Use fewer virtual tokens"):
        teacher_ids(tiny32, replace(config, init="teacher"), INPUTS)


def test_rows_to_be_distilled_need_no_targets(tiny32: FrozenModel, tmp_path: Path) -> None:
    path = tmp_path / "inputs.jsonl"
    path.write_text('{"input": "good"}\n{"input": "bad"}\n{"input": "fine"}\n{"input": "poor"}\n')
    config = replace(LEARNS, teacher_template=TEACHER, labels=("yes", "no"), steps=2, evaluations=1)
    manifest = train_task(tiny32, TaskFiles("mood", path), config).manifest
    assert manifest.labels == ("yes", "no")
    assert manifest.training is not None
    assert manifest.training["teacher_template"] == TEACHER


@pytest.mark.parametrize(
    ("template", "rows", "message"),
    [
        (TEACHER, [("a", "-"), ("x" * 120, "-")], r"line 2: the teacher reads \d+ tokens and answers up to 5; the con"),
    ],
)
def test_a_teachers_text_that_cannot_be_read_is_refused(
    tiny: FrozenModel, template: str, rows: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(InvalidTrainingData, match=message):
        lessons(tiny, replace(CONFIG, teacher_template=template), data_of(rows))


def test_a_chat_needs_a_chat_template(tiny: FrozenModel) -> None:
    with pytest.raises(ConfigurationError, match=r"has no chat template\. Leave out --teacher-chat"):
        lessons(tiny, replace(CONFIG, teacher_chat=True))
    assert EOS in tiny.eos_token_ids
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    chatty = FrozenModel(tiny_module(attention="prelude"), tokenizer, name="chatty", max_model_len=128)
    asked = request("a", tuple(chatty.text.encode(f"<{TEACHER.replace('{input}', 'good')}>")), max_new_tokens=5)
    served = run_engine(make_engine(chatty), [(asked, None)])["a"]
    [lesson] = lessons(chatty, replace(CONFIG, teacher_chat=True), INPUTS.first(1))
    assert list(lesson.examples[0].target_ids) == served.token_ids
