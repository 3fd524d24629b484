"""Distillation: targets from the frozen model after a long text, for a few virtual tokens.

The idea is prompt compression (Askell et al. 2021, Snell et al. 2022, Mu et al. 2023): instructions and worked examples
are read once by the teacher, the frozen model itself, and a soft prompt learns to have the same effect. Rows need no
targets. The common beginning of the teacher's texts is computed once and kept as keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.contracts import FinishReason, GenerationRequest, SamplingParams
from server.engine.engine import Engine
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.model.frozen import FrozenModel
from server.engine.text.model_text import common_start
from server.errors import ConfigurationError, GenerationFailed, InvalidTrainingData
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.config import TrainingConfig
from server.train.data import DataFile, Example
from server.train.forward import key_values_of, rows_logits
from server.train.methods import KeyValues, join_key_values
from server.train.objectives import Lesson, TokenShares, split_labels

ANSWERING = 16
"""Number of the teacher's answers that are generated at once."""
KEPT_TOKENS = 64
"""Number of likeliest tokens kept of each of the teacher's distributions; the rest is summed."""
TEACHER_BATCH = 16
COMPARED = 64
"""Rows whose teacher's texts are compared to find their common beginning."""


@dataclass(frozen=True)
class Teacher:
    """The frozen model after the long text."""

    model: FrozenModel
    template: str
    chat: bool

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of the long text with a row's input in it.

        Raises ConfigurationError if it is to go through a chat template that the model does not have.
        """
        whole = Manifest(input_template=self.template).render(text)
        if not self.chat:
            return tuple(self.model.text.encode(whole))
        if not self.model.tokenizer.chat_template:
            raise ConfigurationError(
                f"{self.model.spec.name} has no chat template.", remedy="Leave out --teacher-chat, or use a chat model."
            )
        rendered = self.model.text.render_chat([{"role": "user", "content": whole.text}])
        return tuple(self.model.text.encode(rendered, add_special_tokens=False))


def distilled_lessons(
    model: FrozenModel,
    config: TrainingConfig,
    data: DataFile,
    students: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    on_row: Callable[[], None] = lambda: None,
) -> list[Lesson]:
    """Run the teacher on each row and return its distributions as lessons.

    Args:
        students: for each row, the token ids that the student reads after the virtual tokens.

    Raises:
        InvalidTrainingData: the teacher's text does not fit the context with a row's input.
    """
    teacher = Teacher(model, config.teacher_template or "", config.teacher_chat)
    read = [teacher.encode(row.input) for row in data.rows]
    labels = [tuple(model.text.encode(label, add_special_tokens=False)) for label in config.labels or ()]
    room = max_new_tokens if not labels else max(map(len, labels))
    for row, ids in zip(data.rows, read, strict=True):
        if len(ids) + room > model.spec.max_model_len:
            raise InvalidTrainingData(
                f"{data.path}, line {row.line}: the teacher reads {len(ids)} tokens and answers up to {room}; "
                f"the context holds {model.spec.max_model_len}.",
                remedy="Shorten the teacher's text or the row.",
            )
    # Keys and values are not all that a model with a recurrent state keeps: there each row reads the whole text.
    shared = () if model.spec.state_width else common_start(read)
    before = key_values_of(model, shared) if shared else None
    own = [ids[len(shared) :] for ids in read]
    ordered = sorted(range(len(own)), key=lambda row: len(own[row]))  # batches of about one length
    lessons: dict[int, Lesson] = {}
    for start in range(0, len(ordered), TEACHER_BATCH):
        rows = ordered[start : start + TEACHER_BATCH]
        asked = [own[row] for row in rows]
        taught = [students[row] for row in rows]
        made = _judge(model, asked, taught, labels, before) if labels else _answer(model, asked, taught, room, before)
        for index, lesson in zip(rows, made, strict=True):
            lessons[index] = lesson
            on_row()
    return [lessons[index] for index in range(len(own))]


def teacher_ids(model: FrozenModel, config: TrainingConfig, data: DataFile) -> tuple[int, ...] | None:
    """The tokens that all of the teacher's texts begin with, whose last keys and values are an initial KV prefix.

    Returns:
        None if `init` is `auto` and the teacher's keys and values cannot be used.

    Raises:
        InvalidTrainingData: `init` is `teacher`, and its keys and values cannot be used.
    """
    teacher = Teacher(model, config.teacher_template or "", config.teacher_chat)
    shared = common_start([teacher.encode(row.input) for row in data.rows[:COMPARED]])
    count = config.num_virtual_tokens
    is_rotary = hasattr(model.module.base_model, "rotary_emb")
    if is_rotary and len(shared) >= count:
        return shared
    if config.init != "teacher":
        return None
    raise InvalidTrainingData(
        f"{count} virtual tokens cannot begin as the teacher's last {count}: "
        + (f"its texts have {len(shared)} in common." if is_rotary else f"{model.spec.name} has no rotary positions."),
        remedy="Use fewer virtual tokens, or init auto." if is_rotary else "Use init auto.",
    )


def text_states(model: FrozenModel, token_ids: Sequence[int], count: int) -> KeyValues:
    """Keys and values of the last `count` tokens of a text, as an initial KV prefix close to the teacher.

    Each of these tokens has attended to the whole text before it and keeps its distance to the input. Keys contain
    their positions, so the text starts at a negative position. The very first token is kept too, because a model
    attends to it from anywhere (attention sinks, Xiao et al. 2024).
    """
    states = key_values_of(model, token_ids, first=count - len(token_ids))
    kept = torch.tensor([0, *range(len(token_ids) - count + 1, len(token_ids))])
    return tuple((key[:, kept].float().cpu(), value[:, kept].float().cpu()) for key, value in states)


@torch.no_grad()
def _judge(
    model: FrozenModel,
    asked: Sequence[tuple[int, ...]],
    students: Sequence[tuple[int, ...]],
    labels: Sequence[tuple[int, ...]],
    before: KeyValues | None,
) -> Iterator[Lesson]:
    """Lessons in labels: what the teacher thinks of each."""
    read = [Example(ids, label) for ids in asked for label in labels]
    logits, targets = rows_logits(model, read, key_values=before)
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    groups = [Lesson(tuple(Example(ids, label) for label in labels)) for ids in students]
    for lesson, shares in zip(groups, split_labels(logprobs, groups), strict=True):
        yield Lesson(lesson.examples, labels=shares.cpu())


@torch.no_grad()
def _answer(
    model: FrozenModel,
    asked: Sequence[tuple[int, ...]],
    students: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    before: KeyValues | None,
) -> Iterator[Lesson]:
    """Lessons in answers: the teacher's own, greedy ones, with its distributions in the place of each token."""
    answers = answers_of(model, asked, max_new_tokens, before)
    read = [Example(ids, answer) for ids, answer in zip(asked, answers, strict=True)]
    logits, _ = rows_logits(model, read, key_values=before)
    top = F.log_softmax(logits, dim=-1).topk(min(KEPT_TOKENS, logits.shape[-1]), dim=-1)
    lengths = [len(answer) for answer in answers]
    views = zip(torch.split(top.indices.cpu(), lengths), torch.split(top.values.cpu(), lengths), strict=True)
    for ids, answer, (kept, logprobs) in zip(students, answers, views, strict=True):
        yield Lesson((Example(ids, answer),), tokens=TokenShares(kept, logprobs))


def answers_of(
    model: FrozenModel, asked: Sequence[tuple[int, ...]], max_new_tokens: int, before: KeyValues | None
) -> list[tuple[int, ...]]:
    """Greedy answers, each with its end token if it has one.

    An engine like a server's generates them; to it, the keys and values of their common beginning are a soft prompt.
    """
    engine = Engine(model, KVCache(model.spec, ANSWERING), PrefixCache(2**26), ANSWERING, 16 * ANSWERING)
    prefix = None if before is None else SoftPrompt("PREFIX_TUNING", join_key_values(before))
    params = SamplingParams(max_new_tokens=max_new_tokens)
    for row, ids in enumerate(asked):
        engine.add(GenerationRequest(str(row), ids, params), prefix)
    answers: list[tuple[int, ...]] = [()] * len(asked)
    while engine.has_work:
        for delta in engine.step():
            if delta.finish_reason is FinishReason.FAILED:
                raise GenerationFailed(f"The teacher's answer to row {int(delta.request_id) + 1} failed: {delta.error}")
            if delta.token is not None:
                answers[int(delta.request_id)] += (delta.token.id,)
    return answers
