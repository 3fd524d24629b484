"""Turns a row into requests of the engine, and their results into an answer.

Every row is asked by ordinary requests: one that generates, and some that score given texts, which are the labels of a
classification, or the target where text is written.
"""

import math
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from server.contracts import Delta, FinishReason, GenerationRequest, Scored
from server.engine.text.choice_scoring import LabelIds, encode_labels, judge
from server.engine.text.model_text import common_start
from server.errors import EmptyInput, GenerationFailed, InputTooLong, InvalidTrainingData
from server.evaluation.data import EvaluationData
from server.evaluation.systems import Host, System
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.rows import Row

QUEUE = "(evaluation)"
"""Name of the queue for evaluation rows. No task can have this name, so the queue takes its turn like one more task."""


@dataclass(frozen=True)
class Answer:
    """The answer of a system to a row."""

    text: str
    """The generated text."""
    chosen: int | None = None
    """Index of the likeliest label, in a classification."""
    loss: float = 0.0
    """Negative log-probability of the target with its end token, where text is written."""
    tokens: int = 0
    """Tokens of that target."""


@dataclass
class RowRequest:
    """One request of a row, and its results so far."""

    row: Row
    request: GenerationRequest
    soft_prompt: SoftPrompt | None
    text: list[str] = field(default_factory=list)
    scored: dict[int, tuple[Scored, ...]] = field(default_factory=dict)
    """By the number of the label in this request."""

    def take(self, delta: Delta) -> bool:
        """Add a step's delta; True once the request has ended. Raises GenerationFailed."""
        if delta.finish_reason in (FinishReason.FAILED, FinishReason.ABORTED):
            raise GenerationFailed(f"Line {self.row.line} got no answer: {delta.error or 'it was aborted'}")
        if delta.token is not None:
            self.text.append(delta.token.text)
        if delta.scored:
            self.scored[delta.index] = delta.scored
        return delta.finish_reason is not None and delta.is_last


class Questions:
    """The rows of one data file as requests, for any system; `labels` are empty if the answers are texts."""

    def __init__(
        self, data: EvaluationData, labels: Sequence[str], host: Host, labels_at_once: int | None = None
    ) -> None:
        """Encode the labels, and check the rows. With more than `labels_at_once`, a row needs several requests.

        Raises:
            InvalidRequest: two labels are the same to the model.
            InvalidTrainingData: a row can never fit the context, or its target is none of the labels.
        """
        self.data = data
        self.labels = tuple(labels)
        self.labels_at_once = labels_at_once or max(1, len(labels))
        self._host = host
        self._label_ids: tuple[LabelIds, ...] = encode_labels(host.text, self.labels) if self.labels else ()
        for row in data.rows:  # before they are tokenised, which takes long
            if not host.text.length_bound.can_fit(row.input, row.target):
                raise InvalidTrainingData(
                    f"{data.name}, line {row.line}: {len(row.input) + len(row.target):,} characters "
                    "can never fit the context.",
                    remedy="Shorten or leave out the row, or raise PRELUDE_MAX_MODEL_LEN.",
                )
        names = {label.strip() for label in self.labels}
        for row in data.rows:
            if names and row.target.strip() not in names:
                raise InvalidTrainingData(
                    f"{data.name}, line {row.line}: the target {row.target[:80]!r} is none of the task's labels "
                    f"({', '.join(self.labels[:20])}).",
                    remedy="Mend the row, or evaluate a task that has this label.",
                )

    @property
    def choices_per_row(self) -> int:
        """Choices that a row has at a time: one that generates, and the labels (or target) of one request."""
        return 1 + (min(len(self.labels), self.labels_at_once) or 1)

    def checked(self, system: System, check_cancelled: Callable[[], None]) -> System:
        """Return the system to use, which computes a common beginning of all rows only once.

        The InvalidTrainingData for a row that does not fit the context names file and line.
        """

        def read() -> Iterator[tuple[int, ...]]:
            for row in self.data.rows:
                check_cancelled()
                asked = self.ask(system, row)
                for one in asked:
                    self._check(system, one)
                yield asked[0].request.input_ids

        start = common_start(read())
        if system.soft_prompt is not None or len(self.data.rows) == 1:
            return system
        return system.after(start, self._host)

    def _check(self, system: System, asked: RowRequest) -> None:
        try:
            self._host.check(asked.request, asked.soft_prompt)
        except (EmptyInput, InputTooLong) as exc:
            suffix = "" if system.soft_prompt is not None else f" for {system.name}"
            raise InvalidTrainingData(
                f"{self.data.name}, line {asked.row.line}{suffix}: {exc.message}",
                remedy="Draw fewer examples, or raise PRELUDE_MAX_MODEL_LEN."
                if system.preamble and not system.chat
                else "Shorten or leave out the row, or raise PRELUDE_MAX_MODEL_LEN.",
            ) from exc

    def ask(
        self, system: System, row: Row, key_id: str | None = None, *, is_background: bool = False
    ) -> tuple[RowRequest, ...]:
        """A row as the requests that a system answers: the first generates, the others score."""
        ids = tuple(system.read(row, self._host))
        name = f"evaluation-{uuid.uuid4().hex}"
        request = partial(GenerationRequest, input_ids=ids, task=QUEUE, key_id=key_id, is_background=is_background)
        sampling, is_alone = system.sampling(row, ids, self._host), system.soft_prompt is None
        given = self._label_ids or (self._target_ids(row),)
        requests = [
            request(f"{name}-text", sampling=sampling, continues_text=is_alone),
            *(
                request(f"{name}-given-{begin}", labels=given[begin : begin + self.labels_at_once])
                for begin in range(0, len(given), self.labels_at_once)
            ),
        ]
        return tuple(RowRequest(row, one, system.prefix) for one in requests)

    def answer(self, generated: RowRequest, *scored: RowRequest) -> Answer:
        """Combine the results of a row's requests into an answer."""
        text = "".join(generated.text)
        given = [part.scored[index] for part in scored for index in range(part.request.num_choices)]
        if self.labels:
            judged = judge(self.labels, given, length_normalized=False)
            best = max(range(len(judged)), key=lambda index: judged[index].probability)
            return Answer(text, chosen=best)
        loss = -math.fsum(token.logprob or 0.0 for token in given[0])
        return Answer(text, loss=loss, tokens=len(given[0]))

    def _target_ids(self, row: Row) -> LabelIds:
        """Token ids of the row's target followed by the end token, as in training."""
        end = self._host.text.end_token_id
        ids = self._host.text.encode(row.target, add_special_tokens=False)
        return (*ids, *(() if end is None else (end,)))


def shown_text(text: str, system: System, data: EvaluationData) -> str:
    """An answer, stripped; of the frozen model alone, only the first line if all targets are single lines."""
    text = text.strip()
    if system.is_lenient and data.is_single_line:
        return text.splitlines()[0].strip() if text else ""
    return text


def is_same(text: str, target: str, *, lenient: bool) -> bool:
    """Whether an answer equals a target; `lenient` ignores case, and ASCII punctuation and white space at both ends."""
    if not lenient:
        return text.strip() == target.strip()
    return bool(text.strip()) and _bare(text) == _bare(target)


def _bare(text: str) -> str:
    """Lower-cased, without punctuation and white space at its ends; a text of only these is unchanged."""
    return (text.strip(string.punctuation + string.whitespace) or text.strip()).casefold()
