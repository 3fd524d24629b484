"""The report of an evaluation: figures with intervals, differences on the same rows, and a verdict in words."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from server.evaluation.intervals import RESAMPLES, SEED, Estimate
from server.evaluation.metrics import ACCURACY, ROUGE_L, Metric


@dataclass(frozen=True)
class EvaluationSubject:
    """The subject of an evaluation, and its data."""

    task: str
    version: int | None
    name: str
    digest: str
    model: str
    dtype: str
    data: str
    data_sha256: str
    rows: int
    labels: tuple[str, ...]
    """The classes; empty if the answers are texts."""
    instruction: str | None = None
    """The instruction that baselines used, if any."""
    known_from: str | None = None
    """`training` or `validation` if the evaluated file is the one that the soft prompt was trained on or selected
    with."""


@dataclass(frozen=True)
class SystemScore:
    """One system's figures, and how long it took."""

    figures: Mapping[Metric, Estimate]
    seconds: float


@dataclass(frozen=True)
class Report:
    """The result of an evaluation; systems are keys by their names."""

    about: EvaluationSubject
    scores: Mapping[str, SystemScore]
    """The subject's come first."""
    differences: Mapping[str, Mapping[Metric, Estimate]]
    """The subject's advantage over each other system on the same rows."""
    by_label: Mapping[str, tuple[int, int]]
    """In a classification: (rows that the subject classifies correctly, rows) of each label."""
    agreement: Mapping[str, Estimate] = field(default_factory=dict)
    """For each other system, the share of rows for which it chooses the same label as the subject."""

    @property
    def main(self) -> Metric:
        """The metric that decides the verdict."""
        return ACCURACY if self.about.labels else ROUGE_L

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of this kind of task."""
        return tuple(self.scores[self.about.name].figures)

    def verdict(self, other: str, metric: Metric | None = None) -> str:
        """`better`, `worse` or `no difference shown`, if the 95 % interval of the difference contains 0."""
        metric = metric or self.main
        difference = self.differences[other][metric]
        if difference.low <= 0.0 <= difference.high:
            return "no difference shown"
        return "worse" if (difference.value > 0) == metric.smaller_is_better else "better"

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Shares are of 1, BLEU is 0 to 100; intervals are `[low, high]`."""
        about = asdict(self.about)
        labels = {label: {"correct": correct, "rows": rows} for label, (correct, rows) in self.by_label.items()}
        return {
            **{name: value for name, value in about.items() if name not in ("labels", "name") and value is not None},
            "kind": "classification" if self.about.labels else "text",
            "intervals": {"method": "bootstrap over rows", "level": 0.95, "resamples": RESAMPLES, "seed": SEED},
            "contestants": {name: self._score(name) for name in self.scores},
            **({"labels": labels} if labels else {}),
        }

    def _score(self, name: str) -> dict[str, Any]:
        score = self.scores[name]
        shown: dict[str, Any] = {metric.key: _estimate(of) for metric, of in score.figures.items()}
        shown["seconds"] = round(score.seconds, 2)
        if name in self.agreement:
            shown["agreement"] = _estimate(self.agreement[name])
        if name in self.differences:
            shown["difference"] = {
                metric.key: {**_estimate(of), "verdict": self.verdict(name, metric)}
                for metric, of in self.differences[name].items()
            }
        return shown

    @property
    def warning(self) -> str | None:
        """A warning if the figures are unreliable (for example, measured on the training data), else None."""
        if self.about.known_from is None:
            return None
        how = "learned from" if self.about.known_from == "training" else "was chosen by"
        return (
            f"These are the rows that {self.about.name} {how}: the figures do not say how it does on rows that it has "
            "not seen."
        )

    def sentence(self, other: str) -> str:
        """Whether what was evaluated is better than another system, with the interval, as one line."""
        metric = self.main
        difference = self.differences[other][metric]
        names = _plainly(self.about.name, other)
        verdict = self.verdict(other)
        start = (
            f"{names[0]} is {verdict} than {names[1]}"
            if verdict != "no difference shown"
            else f"no difference shown between {names[0]} and {names[1]}"
        )
        return f"{start}: {metric.title} {written_difference(metric, difference)}"

    def agreement_sentence(self, other: str) -> str:
        """How often what was evaluated chooses another system's label, as one line."""
        value, interval = written_estimate(ACCURACY, self.agreement[other])
        return f"{self.about.name} chooses the same label as {other} on {value} of the rows (95 % interval {interval})"


def _plainly(one: str, other: str) -> tuple[str, str]:
    """Short names of two systems for a sentence; two versions of one task are called by their numbers."""
    (task, _, version), (other_task, _, other_version) = one.partition("@"), other.partition("@")
    if version and other_version and task == other_task:
        return f"version {version}", other_version
    return one, other


def _estimate(of: Estimate) -> dict[str, Any]:
    return {"value": round(of.value, 4), "interval": [round(of.low, 4), round(of.high, 4)]}


def written_figure(metric: Metric, value: float, *, sign: bool = False) -> str:
    """A figure as people read it: percent of shares, else a number."""
    number = 100 * value if metric.is_share else value
    return f"{number:{'+' if sign else ''}.{1 if metric.is_share or abs(number) < 1000 else 0}f}"


def written_estimate(metric: Metric, of: Estimate) -> tuple[str, str]:
    """A figure and its interval."""
    unit = " %" if metric.is_share else ""
    low, high = written_figure(metric, of.low), written_figure(metric, of.high)
    return f"{written_figure(metric, of.value)}{unit}", f"{low} to {high}"


def written_difference(metric: Metric, of: Estimate) -> str:
    """A difference and its interval; of percentages it is points."""
    points = " points" if metric.is_share else ""
    low, high = (written_figure(metric, value, sign=value < 0) for value in (of.low, of.high))
    return f"{written_figure(metric, of.value, sign=True)}{points} (95 % interval {low} to {high})"
