"""One evaluation: requests for each system, and the report on the answers. Its caller runs the requests.

`prelude eval` steps an engine of its own (`standalone.py`); a server asks the engine that serves (`beside_traffic.py`).
Both call `prepare`, then `Evaluation.ask` for each row, then `Evaluation.report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from server.evaluation import metrics
from server.evaluation import systems as ways
from server.evaluation.data import EvaluationData
from server.evaluation.intervals import Bootstrap, Statistic
from server.evaluation.metrics import Statistics
from server.evaluation.questions import Answer, Questions, RowRequest
from server.evaluation.report import EvaluationSubject, Report, SystemScore
from server.evaluation.resource_limits import EvaluationBounds
from server.evaluation.systems import Host, RequestedBaselines, System, TeacherText
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import DataFile
from server.train.rows import Row

Answers = list[Answer]


@dataclass(frozen=True)
class Evaluation:
    """Everything about an evaluation but the answers.

    Attributes:
        about: what is evaluated, for the report.
        systems: who is asked; the first is what the evaluation is about.
        questions: how rows are asked.
    """

    about: EvaluationSubject
    systems: tuple[System, ...]
    questions: Questions

    @property
    def rows(self) -> Sequence[Row]:
        """The rows that every system is asked."""
        return self.questions.data.rows

    @property
    def num_questions(self) -> int:
        """Rows times systems."""
        return len(self.rows) * len(self.systems)

    def checked(self, go_on: Callable[[], None]) -> Evaluation:
        """Refuse rows that can never run, before any request is sent; return the evaluation to run.

        Raises:
            InvalidTrainingData: a row does not fit the context; names file and line.
            ConfigurationError: what measures text is not installed.
        """
        if not self.questions.labels:
            metrics.check_installed()
        return replace(self, systems=tuple(self.questions.checked(one, go_on) for one in self.systems))

    def ask(
        self, system: System, row: Row, key_id: str | None = None, *, is_background: bool = False
    ) -> tuple[RowRequest, ...]:
        """A row as requests; see Questions."""
        return self.questions.ask(system, row, key_id, is_background=is_background)

    def report(
        self, answers: Mapping[str, Answers], seconds: Mapping[str, float], go_on: Callable[[], None] = lambda: None
    ) -> Report:
        """Build the report from all answers.

        Args:
            answers: of each system, by its name, in the order of the rows.
            seconds: how long each took.
            go_on: called between pieces of the work; if it raises, the work ends.
        """
        found = {one.name: self._statistics(one, answers[one.name], go_on) for one in self.systems}
        bootstrap = Bootstrap(len(self.rows))
        subject = self.systems[0].name
        return Report(
            about=self.about,
            scores={
                name: SystemScore({metric: bootstrap.estimate(of) for metric, of in statistics.items()}, seconds[name])
                for name, statistics in found.items()
            },
            differences={
                name: {metric: bootstrap.difference(of, found[subject][metric]) for metric, of in statistics.items()}
                for name, statistics in found.items()
                if name != subject
            },
            by_label=self._by_label(answers[subject]),
            agreement={name: bootstrap.estimate(self._agreement(answers, name)) for name in found if name != subject}
            if self.questions.labels
            else {},
        )

    def _statistics(self, system: System, answers: Answers, go_on: Callable[[], None]) -> Statistics:
        go_on()
        questions = self.questions
        if questions.labels:
            return metrics.classification(answers, system, questions.data, questions.labels)
        return metrics.written(answers, system, questions.data, go_on)

    def _agreement(self, answers: Mapping[str, Answers], other: str) -> Statistic:
        """Share of the rows for which the first and another system choose the same label."""
        pairs = zip(answers[self.systems[0].name], answers[other], strict=True)
        return metrics.share([one.chosen == two.chosen for one, two in pairs])

    def _by_label(self, answers: Answers) -> dict[str, tuple[int, int]]:
        """For each label that occurs in the data: (rows classified correctly, rows)."""
        chosen: dict[str, list[int | None]] = {}
        for answer, row in zip(answers, self.rows, strict=True):
            chosen.setdefault(row.target.strip(), []).append(answer.chosen)
        return {
            label: (chosen[label.strip()].count(index), len(chosen[label.strip()]))
            for index, label in enumerate(self.questions.labels)
            if label.strip() in chosen
        }


def prepare(
    host: Host,
    data: EvaluationData,
    subject: tuple[str, SoftPrompt],
    *,
    others: Sequence[tuple[str, SoftPrompt]] = (),
    wanted: RequestedBaselines | None = None,
    instruction: str | None = None,
    shots: DataFile | None = None,
    teacher: TeacherText | None = None,
    version: int | None = None,
    bounds: EvaluationBounds | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Put an evaluation together, and check all of it.

    Args:
        host: the engine that will be asked.
        data: the rows.
        subject: what is evaluated, and its name.
        others: other versions, and their names.
        wanted: baselines.
        instruction: of the baselines; by default that of the data's folder.
        shots: training data for k-shot.
        teacher: a text of one's own, to be asked too.
        version: the subject's number, if it has one.
        bounds: resource limits; None is no limit.
        go_on: called between pieces of the work; if it raises, the work ends.

    Raises:
        InvalidRequest, InvalidTrainingData, ConfigurationError: something is missing or does not fit.
    """
    manifest = subject[1].manifest
    labels = manifest.labels or data.labels or ()
    if bounds is not None:
        bounds.check_rows(data, len(labels))
    questions = Questions(data, labels, host, None if bounds is None else bounds.labels_at_once)
    wanted = wanted or RequestedBaselines()
    alone = (
        ways.baselines(
            wanted,
            data,
            host,
            manifest,
            instruction=instruction,
            shots=shots,
            labels=labels or None,
            teacher=teacher,
            go_on=go_on,
        )
        if wanted.names(teacher=teacher is not None)
        else []
    )
    asked = [ways.of_soft_prompt(*one) for one in (subject, *others)]
    instruction = (instruction or data.instruction) if any(one.preamble for one in alone) else None
    about = _subject(host, data, subject, version, labels, instruction)
    evaluation = Evaluation(about, (*asked, *alone), questions)
    if bounds is not None:
        bounds.check_reading(data, evaluation.systems)
    return evaluation.checked(go_on)


def _subject(
    host: Host,
    data: EvaluationData,
    subject: tuple[str, SoftPrompt],
    version: int | None,
    labels: Sequence[str],
    instruction: str | None,
) -> EvaluationSubject:
    name, soft_prompt = subject
    return EvaluationSubject(
        task=name.partition("@")[0],
        version=version,
        name=name,
        digest=soft_prompt.digest,
        model=host.model.name,
        dtype=host.model.dtype,
        data=data.name,
        data_sha256=data.sha256,
        rows=len(data.rows),
        labels=tuple(labels),
        instruction=instruction,
        known_from=_known_from(soft_prompt, data.sha256),
    )


def _known_from(soft_prompt: SoftPrompt, sha256: str) -> str | None:
    """Whether a data file is one that a soft prompt was made with, as its manifest tells."""
    told = soft_prompt.manifest.training or {}
    for part in ("training", "validation"):
        hashes = told.get("data_sha256" if part == "training" else "validation_sha256")
        if sha256 in (hashes if isinstance(hashes, list) else [hashes]):
            return part
    return None
