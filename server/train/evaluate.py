"""Exact match through the served path: every row is an ordinary request of the engine, and all are sent at once.

What is measured is what a client gets: the task's template and generation defaults, continuous batching, the text after
detokenising and stop strings. The frozen model alone, asked by an instruction, is the baseline beside it.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.core import Delta, FinishReason, GenerationRequest, SamplingParams
from server.engine.engine import Engine
from server.errors import ConfigurationError, EmptyInput, GenerationFailed, InputTooLong, InvalidTrainingData
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import DataFile, Row

BASELINE_SLACK = 8
"""New tokens that the frozen model alone gets beyond the longest target."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated for a row, and whether it counts as the row's target."""

    row: Row
    text: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """The answers to a data file's rows, in its order, and how long all of them together took."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def correct(self) -> int:
        """Rows that were answered with their target."""
        return sum(answer.correct for answer in self.answers)

    @property
    def exact_match(self) -> float:
        """Share of the rows that were answered with their target."""
        return self.correct / len(self.answers)

    @property
    def requests_per_second(self) -> float:
        """Rows per second."""
        return len(self.answers) / self.seconds

    def by_label(self, labels: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(correct, rows) of every label that is some row's target."""
        targets = {label: [a.correct for a in self.answers if a.row.target == label] for label in labels}
        return {label: (sum(correct), len(correct)) for label, correct in targets.items() if correct}

    def as_dict(self, labels: Sequence[str]) -> dict[str, object]:
        """For one line of JSON."""
        return {
            "rows": len(self.answers),
            "correct": self.correct,
            "exact_match": round(self.exact_match, 4),
            "seconds": round(self.seconds, 2),
            "requests_per_second": round(self.requests_per_second, 1),
            "labels": {
                label: {"correct": correct, "rows": rows} for label, (correct, rows) in self.by_label(labels).items()
            },
        }


def evaluate_task(
    engine: Engine, soft_prompt: SoftPrompt, data: DataFile, on_answer: Callable[[], None] = lambda: None
) -> Evaluation:
    """Ask a soft prompt for every row; an answer counts if, without the white space around it, it is the target.

    Decoding is greedy unless the manifest's generation defaults say otherwise; if they sample and name no seed, a row's
    seed is its line number, so that the figure can be had again.

    Raises:
        InvalidTrainingData: a row can never fit the context; before anything is generated.
        GenerationFailed: the engine could not finish a row.
    """
    manifest, model = soft_prompt.manifest, engine.model

    def ask(row: Row) -> GenerationRequest:
        input_ids = model.encode(manifest.render(row.input))
        room = model.spec.max_model_len - soft_prompt.num_virtual_tokens - len(input_ids)
        params = manifest.generation.sampling_params({}, room=room, seed=row.line)
        return GenerationRequest(str(row.line), tuple(input_ids), params, manifest.task)

    return _evaluate(engine, soft_prompt, data, ask, lambda text, target: text.strip() == target.strip(), on_answer)


def evaluate_baseline(
    engine: Engine, instruction: str, data: DataFile, on_answer: Callable[[], None] = lambda: None
) -> Evaluation:
    """Ask the frozen model alone, zero-shot, as a chat model is asked.

    A row becomes one user message, the instruction, an empty line and the input, in the tokenizer's chat template with
    its generation prompt (and whatever system message the template adds by itself). Decoding is greedy, up to the
    longest target's tokens and a few more. `counts_as_baseline` says which answers count.

    Raises:
        ConfigurationError: the tokenizer has no chat template.
        InvalidTrainingData, GenerationFailed: as for `evaluate_task`.
    """
    model, tokenizer = engine.model, engine.model.tokenizer
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            f"{model.spec.name} has no chat template, so it cannot be asked for a baseline.",
            remedy="Leave the baseline out, or let PRELUDE_MODEL name a model that is tuned for chat.",
        )
    longest = max(len(tokenizer.encode(row.target, add_special_tokens=False)) for row in data.rows)
    params = SamplingParams(max_new_tokens=longest + BASELINE_SLACK)

    def ask(row: Row) -> GenerationRequest:
        message = {"role": "user", "content": f"{instruction}\n\n{row.input}"}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return GenerationRequest(str(row.line), tuple(tokenizer.encode(text, add_special_tokens=False)), params)

    return _evaluate(engine, None, data, ask, counts_as_baseline, on_answer)


def counts_as_baseline(text: str, target: str) -> bool:
    """True if the first line of an answer that is not blank is the target, but for case and what stands around it.

    That is ASCII punctuation and white space, around either of the two; inside them both count. A model that was not
    trained on the form of the answers is not held to it.
    """
    lines = text.strip().splitlines()
    return bool(lines) and _bare(lines[0]) == _bare(target)


def _bare(text: str) -> str:
    """Without case and what stands around it; a text of nothing else stays as it is."""
    return (text.strip(string.punctuation + string.whitespace) or text.strip()).casefold()


def _evaluate(
    engine: Engine,
    soft_prompt: SoftPrompt | None,
    data: DataFile,
    ask: Callable[[Row], GenerationRequest],
    counts: Callable[[str, str], bool],
    on_answer: Callable[[], None],
) -> Evaluation:
    """Check every row, then submit all of them and step the engine until each has its answer."""
    started = time.perf_counter()
    requests = {row: ask(row) for row in data.rows}
    for row, request in requests.items():
        try:
            engine.check(request, soft_prompt)
        except (EmptyInput, InputTooLong) as exc:
            raise InvalidTrainingData(
                f"{data.path}, line {row.line}: {exc.message}",
                remedy="Shorten or leave out the row, or raise PRELUDE_MAX_MODEL_LEN.",
            ) from exc
    for request in requests.values():
        engine.add(request, soft_prompt)
    texts = {request.request_id: "" for request in requests.values()}
    for delta in _run(engine):
        if delta.finish_reason is FinishReason.FAILED:
            raise GenerationFailed(f"{data.path}, line {delta.request_id}: {delta.error}")
        if delta.token is not None and not delta.token.special:
            texts[delta.request_id] += delta.token.text
        if delta.finish_reason is not None:
            on_answer()
    seconds = time.perf_counter() - started
    answered = [(row, texts[request.request_id]) for row, request in requests.items()]
    return Evaluation(tuple(Answer(row, text, counts(text, row.target)) for row, text in answered), seconds)


def _run(engine: Engine) -> Iterator[Delta]:
    while engine.has_work:
        yield from engine.step()
