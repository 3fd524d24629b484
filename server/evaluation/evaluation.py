"""One evaluation: requests for each system, and the report on the answers. Its caller runs the requests.

`prelude eval` steps an engine of its own (`standalone.py`); a server asks the engine that serves (`beside_traffic.py`).
Both call `prepare`, then `Questions.ask` for each row, then `Evaluation.report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.evaluation import metrics
from server.evaluation.data import EvaluationData
from server.evaluation.intervals import Bootstrap, Statistic
from server.evaluation.metrics import Statistics
from server.evaluation.questions import Answer, Questions
from server.evaluation.report import EvaluationSubject, Report, SystemScore
from server.evaluation.resource_limits import EvaluationBounds
from server.evaluation.systems import Host, RequestedBaselines, System, TeacherText, baselines, of_soft_prompt
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import DataFile
from server.train.rows import Row

Answers = list[Answer]


@dataclass(frozen=True)
class Evaluation:
    """Everything about an evaluation but the answers; the first system is the subject."""

    about: EvaluationSubject
    systems: tuple[System, ...]
    questions: Questions

    @property
    def rows(self) -> Sequence[Row]:
        """The rows, which every system answers."""
        return self.questions.data.rows

    @property
    def num_questions(self) -> int:
        """Rows times systems."""
        return len(self.rows) * len(self.systems)

    def checked(self, check_cancelled: Callable[[], None]) -> Evaluation:
        """Refuse (InvalidTrainingData) rows that can never run, before any request; return the evaluation to run."""
        if not self.questions.labels:
            metrics.check_installed()
        return replace(self, systems=tuple(self.questions.checked(one, check_cancelled) for one in self.systems))

    def report(
        self,
        answers: Mapping[str, Answers],
        seconds: Mapping[str, float],
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> Report:
        """Build the report from the answers and the duration of each system, by its name; answers in row order."""
        found = {one.name: self._statistics(one, answers[one.name], check_cancelled) for one in self.systems}
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

    def _statistics(self, system: System, answers: Answers, check_cancelled: Callable[[], None]) -> Statistics:
        check_cancelled()
        questions = self.questions
        if questions.labels:
            return metrics.classification(answers, system, questions.data, questions.labels)
        return metrics.written(answers, system, questions.data, check_cancelled)

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
    check_cancelled: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Build an evaluation, and check all of it.

    Args:
        others: other versions, each after its name.
        instruction, shots, teacher: see `baselines`.
        check_cancelled: called between pieces of the work; if it raises, the work ends.

    Raises:
        InvalidRequest, InvalidTrainingData, ConfigurationError: something is missing or does not fit.
    """
    name, soft_prompt = subject
    manifest = soft_prompt.manifest
    labels = manifest.labels or data.labels or ()
    if bounds is not None:
        bounds.check_rows(data, len(labels))
    questions = Questions(data, labels, host, None if bounds is None else bounds.labels_at_once)
    given: dict[str, Any] = {"instruction": instruction, "shots": shots, "labels": labels, "teacher": teacher}
    alone = baselines(wanted or RequestedBaselines(), data, host, manifest, **given, check_cancelled=check_cancelled)
    about = EvaluationSubject(
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
        instruction=(instruction or data.instruction) if any(system.preamble for system in alone) else None,
        known_from=_known_from(manifest, data.sha256),
    )
    versions = [of_soft_prompt(*one) for one in (subject, *others)]
    evaluation = Evaluation(about, (*versions, *alone), questions)
    if bounds is not None:
        bounds.check_reading(data, evaluation.systems)
    return evaluation.checked(check_cancelled)


def _known_from(manifest: Manifest, sha256: str) -> str | None:
    """`training` or `validation` if the manifest says that the soft prompt was made with this data file."""
    for part, field in (("training", "data_sha256"), ("validation", "validation_sha256")):
        hashes = (manifest.training or {}).get(field)
        if sha256 in (hashes if isinstance(hashes, list) else [hashes]):
            return part
    return None
