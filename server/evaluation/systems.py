"""The systems that answer: a soft prompt, or the frozen model alone, as one of the baselines.

Every system gets the same rows. The systems differ only in the text that they build from a row's input:

    zero-shot     the task's own template without virtual tokens: what the soft prompt adds
    instruction   the instruction, an empty line and the input, as a chat: what most people would try first
    k-shot        the instruction and k examples from the training data, as plain text: the strongest text prompt
    teacher       the user's text around the input: what a soft prompt was distilled from, or is to replace
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from server.contracts import GenerationRequest, ModelSpec, SamplingParams
from server.engine.text.model_text import ModelText
from server.errors import InvalidRequest, InvalidTrainingData
from server.evaluation.data import EvaluationData
from server.soft_prompts.manifest import INPUT_FIELD, Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import DataFile
from server.train.rows import Row

ZERO_SHOT, INSTRUCTION, TEACHER = "zero-shot", "instruction", "teacher"
INPUT, TARGET = "Input: ", "\nAnswer:\n"
"""Texts before inputs and targets of examples. A target begins a line, so its tokens are those of a label."""
MOST_SHOTS = 256
BASELINE_SLACK = 8
"""Number of new tokens that baselines may generate beyond the longest target."""

_SHOTS = re.compile(r"([1-9][0-9]{0,2})-shot")
_VERSION = re.compile(r"@?([1-9][0-9]{0,9})")


class Host(Protocol):
    """The interface that an evaluation needs from its engine (its own, or the server's)."""

    @property
    def model(self) -> ModelSpec:
        """The frozen model."""

    @property
    def text(self) -> ModelText:
        """The model's texts and tokens."""

    def embeddings_of(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings `[tokens, hidden_size]`."""

    def check(self, request: GenerationRequest, soft_prompt: SoftPrompt | None) -> None:
        """Refuse what can never run."""


@dataclass(frozen=True)
class RequestedBaselines:
    """The baselines of an evaluation; `shots` are numbers of examples, `versions` those of the same task."""

    zero_shot: bool = False
    instruction: bool = False
    shots: tuple[int, ...] = ()
    versions: tuple[int, ...] = ()

    def names(self, *, teacher: bool = False) -> list[str]:
        """Names of the systems without a soft prompt, in their order."""
        alone = [ZERO_SHOT] * self.zero_shot + [INSTRUCTION] * self.instruction
        return [*alone, *(f"{count}-shot" for count in self.shots), *([TEACHER] * teacher)]

    @classmethod
    def parse(cls, names: Sequence[str]) -> RequestedBaselines:
        """From names: `zero-shot`, `instruction`, `4-shot`, `@2`; raises InvalidRequest for others."""
        shots: list[int] = []
        versions: list[int] = []
        for name in names:
            if name in (ZERO_SHOT, INSTRUCTION):
                continue
            if (match := _SHOTS.fullmatch(name)) and int(match[1]) <= MOST_SHOTS:
                shots.append(int(match[1]))
            elif match := _VERSION.fullmatch(name):
                versions.append(int(match[1]))
            else:
                raise InvalidRequest(
                    f"There is no baseline {name[:80]!r}.",
                    remedy="Name some of zero-shot, instruction, 4-shot (or another number) and @2 (a version), "
                    "with commas between them.",
                    param="baselines",
                )
        return cls(
            ZERO_SHOT in names, INSTRUCTION in names, tuple(dict.fromkeys(shots)), tuple(dict.fromkeys(versions))
        )


@dataclass(frozen=True)
class TeacherText:
    """The teacher's text."""

    template: str
    """Contains `{input}` once."""
    chat: bool = False
    """Whether it is sent as a user message."""


@dataclass(frozen=True)
class System:
    """A system under evaluation: a soft prompt, or the frozen model alone.

    Attributes:
        soft_prompt: None is the frozen model alone.
        template: the template of the input, for systems that do not use a chat.
        preamble: plain text before the template: instruction and examples.
        chat: the text is a user message, and goes through the chat template.
        longest: maximum number of new tokens of the frozen model alone.
        stop: its stop strings.
        shared: the common beginning of all rows as embeddings: the engine computes it once, like a soft prompt.
    """

    name: str
    soft_prompt: SoftPrompt | None = None
    template: Manifest = field(default_factory=Manifest)
    preamble: str = ""
    chat: bool = False
    longest: int = 0
    stop: tuple[str, ...] = ()
    shared: SoftPrompt | None = None

    @property
    def prefix(self) -> SoftPrompt | None:
        """The soft prompt before the tokens of a row."""
        return self.soft_prompt or self.shared

    @property
    def is_lenient(self) -> bool:
        """Whether answers are compared leniently: those of the frozen model alone, which has not learned their form."""
        return self.soft_prompt is None

    def read(self, row: Row, host: Host) -> list[int]:
        """The token ids of a row, after the prefix if there is one."""
        text = self.template.render(row.input).behind(self.preamble)
        if self.chat:
            text = host.text.render_chat([{"role": "user", "content": text.text}])
        ids = host.text.encode(text, add_special_tokens=not self.chat)
        return ids[self.shared.num_virtual_tokens :] if self.shared is not None else ids

    def after(self, start: tuple[int, ...], host: Host) -> System:
        """This system, with the tokens that all rows begin with computed once instead of in every row."""
        if not start:
            return self
        return replace(self, shared=SoftPrompt("PROMPT_TUNING", host.embeddings_of(start)))

    def sampling(self, row: Row, input_ids: Sequence[int], host: Host) -> SamplingParams:
        """The sampling parameters for a row: a soft prompt's own, or greedy decoding for the frozen model alone.

        If a task samples without a seed, the line number is the seed, so that the evaluation can be reproduced.
        """
        if self.soft_prompt is None:
            return SamplingParams(max_new_tokens=self.longest, stop=self.stop)
        room = host.model.max_model_len - self.soft_prompt.num_virtual_tokens - len(input_ids)
        return self.soft_prompt.manifest.generation.sampling_params({}, room=room, seed=row.line)


def of_soft_prompt(name: str, soft_prompt: SoftPrompt) -> System:
    """A version of a task, as clients use it."""
    return System(name, soft_prompt, soft_prompt.manifest)


def baselines(
    wanted: RequestedBaselines,
    data: EvaluationData,
    host: Host,
    manifest: Manifest,
    *,
    instruction: str | None = None,
    shots: DataFile | None = None,
    labels: Sequence[str] = (),
    teacher: TeacherText | None = None,
    seed: int = 0,
    check_cancelled: Callable[[], None] = lambda: None,
) -> list[System]:
    """The requested baselines, each of which is the frozen model alone.

    Args:
        data: the rows; baselines may generate as many tokens as the longest target has, plus a few.
        instruction: of the baselines; by default that of the data's folder.
        shots: training data for k-shot.
        labels: the task's classes: examples are balanced over them.
        check_cancelled: called between pieces of the work; if it raises, the work ends.

    Raises:
        InvalidRequest: there is no instruction, no training data or no chat template where one is needed.
        InvalidTrainingData: the training data has not enough rows.
    """
    if not wanted.names(teacher=teacher is not None):
        return []
    instruction = instruction or data.instruction
    longest = _longest_target(data, host, check_cancelled) + BASELINE_SLACK
    found = []
    if wanted.zero_shot:
        template = Manifest(input_template=manifest.input_template, system_message=manifest.system_message)
        found.append(System(ZERO_SHOT, template=template, longest=longest))
    if wanted.instruction:
        if instruction is None:
            raise InvalidRequest(
                "The baseline `instruction` needs an instruction.",
                remedy='Give one, or put it into meta.json beside the data: {"instruction": "…"}.',
                param="instruction",
            )
        _check_chat(host, INSTRUCTION)
        found.append(System(INSTRUCTION, preamble=f"{instruction}\n\n", chat=True, longest=longest))
    found += [_few_shot(count, data, host, instruction, shots, labels, seed, longest) for count in wanted.shots]
    if teacher is not None:
        if teacher.chat:
            _check_chat(host, TEACHER)
        if not host.text.length_bound.can_fit(teacher.template):
            raise InvalidRequest("The teacher's text does not fit the context.", remedy="Shorten it.", param="teacher")
        found.append(System(TEACHER, template=_template_of(teacher), chat=teacher.chat, longest=longest))
    return found


def _few_shot(
    count: int,
    data: EvaluationData,
    host: Host,
    instruction: str | None,
    shots: DataFile | None,
    labels: Sequence[str],
    seed: int,
    longest: int,
) -> System:
    """The frozen model after `count` examples; see `baselines`."""
    if shots is None:
        raise InvalidRequest(
            f"The baseline {count}-shot needs training data to draw examples from.",
            remedy="Name it with --shots-data (over HTTP: send it as `shots`).",
            param="shots",
        )
    examples = draw_examples(shots, data, count, labels, seed)
    parts = [] if instruction is None else [instruction]
    parts += [f"{INPUT}{row.input}{TARGET}{row.target}" for row in examples]
    preamble = "".join(f"{part}\n\n" for part in parts)
    stop = (f"\n\n{INPUT}",) if data.is_single_line else ()
    if not host.text.length_bound.can_fit(preamble):
        raise InvalidTrainingData(f"{count} examples of {shots.path} do not fit the context.", remedy="Draw fewer.")
    template = Manifest(input_template=f"{INPUT}{{input}}{TARGET}")
    return System(f"{count}-shot", template=template, preamble=preamble, longest=longest, stop=stop)


def _longest_target(data: EvaluationData, host: Host, check_cancelled: Callable[[], None]) -> int:
    longest = 0
    for target in dict.fromkeys(row.target for row in data.rows):
        check_cancelled()
        longest = max(longest, len(host.text.encode(target, add_special_tokens=False)))
    return longest


def draw_examples(
    shots: DataFile, data: EvaluationData, count: int, labels: Sequence[str] | None, seed: int
) -> list[Row]:
    """`count` rows of the training data, in random order, balanced over the labels as far as possible.

    A row whose input is evaluated is left out, because it would reveal its answer. Raises InvalidTrainingData.
    """
    asked = {row.input for row in data.rows}
    rows = [row for row in shots.rows if row.input not in asked]
    if len(rows) < count:
        raise InvalidTrainingData(
            f"{shots.path} has {len(rows)} rows that are not evaluated; {count}-shot needs {count}.",
            remedy="Draw fewer examples, or name more training data.",
        )
    rng = random.Random(seed)
    rng.shuffle(rows)
    if not labels:
        return rows[:count]
    groups: dict[str, list[Row]] = {label: [] for label in labels}
    others: list[Row] = []
    for row in rows:
        groups.get(row.target, others).append(row)
    by_label = [groups[label] for label in rng.sample(list(labels), len(labels))]
    turns = [row for turn in range(count) for group in by_label for row in group[turn : turn + 1]]
    chosen = [*turns, *others][:count]
    rng.shuffle(chosen)
    return chosen


def _template_of(teacher: TeacherText) -> Manifest:
    if teacher.template.count(INPUT_FIELD) != 1:
        raise InvalidRequest(
            f"The teacher's text does not hold {INPUT_FIELD} exactly once.",
            remedy=f"Write {INPUT_FIELD} where the row's input belongs.",
            param="teacher",
        )
    return Manifest(input_template=teacher.template)


def _check_chat(host: Host, name: str) -> None:
    try:
        host.text.render_chat([{"role": "user", "content": "Hello"}])
    except InvalidRequest as exc:
        raise InvalidRequest(
            f"{host.model.name} cannot be asked as `{name}`: {exc.message}",
            remedy="Leave it out (plain text needs no chat), or serve a model that is tuned for chat.",
            param="baselines",
        ) from exc
