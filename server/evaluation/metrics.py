"""Metrics for each kind of task, every one as sums over rows, so that it can be resampled.

A classification is measured in two ways: by the likeliest label (the form of the answer cannot be wrong) and by the
generated text (what a client gets that sends no `choices`). Other tasks are measured by exact match, ROUGE-L, BLEU and
perplexity.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.errors import ConfigurationError
from server.evaluation.data import EvaluationData
from server.evaluation.intervals import Floats, Statistic
from server.evaluation.questions import Answer, is_same, shown_text
from server.evaluation.systems import System

BLEU_ORDER = 4


@dataclass(frozen=True)
class Metric:
    """A figure's name and how it is written."""

    key: str
    title: str
    is_share: bool = True
    """A share of 1, written in percent."""
    smaller_is_better: bool = False


ACCURACY = Metric("accuracy_choices", "accuracy")
MACRO_F1 = Metric("macro_f1_choices", "macro-F1")
GENERATED_ACCURACY = Metric("accuracy_generated", "accuracy, generated")
GENERATED_MACRO_F1 = Metric("macro_f1_generated", "macro-F1, generated")
EXACT_MATCH = Metric("exact_match", "exact match")
ROUGE_L = Metric("rouge_l", "ROUGE-L")
BLEU = Metric("bleu", "BLEU", is_share=False)
PERPLEXITY = Metric("perplexity", "perplexity", is_share=False, smaller_is_better=True)

Statistics = dict[Metric, Statistic]


def classification(
    answers: Sequence[Answer], system: System, data: EvaluationData, labels: Sequence[str]
) -> Statistics:
    """Accuracy and macro-F1, by the likeliest label and by the generated text."""
    targets = [_index(labels, row.target, lenient=False) for row in data.rows]
    chosen = [answer.chosen for answer in answers]
    texts = [shown_text(answer.text, system, data) for answer in answers]
    generated = [_index(labels, text, lenient=system.is_lenient) for text in texts]
    return {
        ACCURACY: accuracy(targets, chosen),
        MACRO_F1: macro_f1(targets, chosen, len(labels)),
        GENERATED_ACCURACY: accuracy(targets, generated),
        GENERATED_MACRO_F1: macro_f1(targets, generated, len(labels)),
    }


def written(
    answers: Sequence[Answer], system: System, data: EvaluationData, check_cancelled: Callable[[], None] = lambda: None
) -> Statistics:
    """Exact match, ROUGE-L, BLEU and perplexity; `check_cancelled` is called before each row."""
    texts = [shown_text(answer.text, system, data) for answer in answers]
    lenient = system.is_lenient
    matches = [
        any(is_same(text, reference, lenient=lenient) for reference in references)
        for text, references in zip(texts, data.references, strict=True)
    ]
    return {
        EXACT_MATCH: share(matches),
        ROUGE_L: rouge_l(texts, data.references, check_cancelled),
        BLEU: bleu(texts, data.references, check_cancelled),
        PERPLEXITY: perplexity([answer.loss for answer in answers], [answer.tokens for answer in answers]),
    }


def check_installed() -> None:
    """Check (ConfigurationError) that the packages which measure text are installed."""
    _rouge_scorer()
    _sentence_bleu()


def share(hits: Sequence[bool | float]) -> Statistic:
    """The mean over rows."""
    values = np.array(hits, dtype=np.float64)
    return Statistic(np.stack([values, np.ones_like(values)], axis=1), lambda sums: sums[..., 0] / sums[..., 1])


def accuracy(targets: Sequence[int | None], predicted: Sequence[int | None]) -> Statistic:
    """Share of the rows whose label was predicted."""
    return share([one is not None and one == other for one, other in zip(targets, predicted, strict=True)])


def macro_f1(targets: Sequence[int | None], predicted: Sequence[int | None], num_labels: int) -> Statistic:
    """F1 of every label, averaged; labels that are neither a row's nor an answer are left out of the mean.

    An answer that is no label (None) is a miss for the row's own label, and nothing for the others.
    """
    actual, found = _one_hot(targets, num_labels), _one_hot(predicted, num_labels)

    def figure(sums: Floats) -> Floats:
        right, of_rows, of_answers = (sums[..., i * num_labels : (i + 1) * num_labels] for i in range(3))
        total = of_rows + of_answers
        f1 = np.where(total > 0, 2 * right / np.maximum(total, 1), 0.0)
        mean: Floats = f1.sum(axis=-1) / np.maximum((total > 0).sum(axis=-1), 1)
        return mean

    return Statistic(np.concatenate([actual * found, actual, found], axis=1), figure)


def rouge_l(
    texts: Sequence[str], references: Sequence[Sequence[str]], check_cancelled: Callable[[], None] = lambda: None
) -> Statistic:
    """ROUGE-L's F-measure with stemming (Lin 2004); for each row, the best over its references."""
    scorer = _rouge_scorer()
    best = []
    for text, several in zip(texts, references, strict=True):
        check_cancelled()
        best.append(max(float(scorer.score(reference, text)["rougeL"].fmeasure) for reference in several))
    return share(best)


def bleu(
    texts: Sequence[str], references: Sequence[Sequence[str]], check_cancelled: Callable[[], None] = lambda: None
) -> Statistic:
    """sacrebleu's corpus BLEU (Papineni et al. 2002, Post 2018), 0 to 100, with all references of a row.

    sacrebleu counts the n-grams of each row; a corpus is the sum of its rows.
    """
    score = _sentence_bleu()
    counted = []
    for text, several in zip(texts, references, strict=True):
        check_cancelled()
        counted.append(score(text, list(several)))
    rows = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in counted], dtype=np.float64)
    return Statistic(rows, _corpus_bleu)


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Statistic:
    """Exponential of the mean loss over all tokens of all targets, their end tokens included."""
    rows = np.array([losses, tokens], dtype=np.float64).T
    return Statistic(rows, lambda sums: np.exp(sums[..., 0] / sums[..., 1]))


def _corpus_bleu(sums: Floats) -> Floats:
    """BLEU of sums `[…, counts, totals, length, reference length]`, with sacrebleu's smoothing (`exp`)."""
    counts, totals = sums[..., :BLEU_ORDER], sums[..., BLEU_ORDER : 2 * BLEU_ORDER]
    length, reference_length = sums[..., -2], sums[..., -1]
    halvings = np.cumsum((counts == 0) & (totals > 0), axis=-1)  # of orders without a match, each next one counts half
    smoothed = np.where(counts > 0, counts, 0.5**halvings)
    precisions = smoothed / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0.0, 1 - reference_length / np.maximum(length, 1)))
    value = 100 * brevity * np.exp(np.log(precisions).mean(axis=-1))
    # As in sacrebleu: without any match, or where no text is long enough for an order, there is nothing to average.
    defined: Floats = np.where((counts.sum(axis=-1) > 0) & (totals[..., -1] > 0) & (length > 0), value, 0.0)
    return defined


def _one_hot(indices: Sequence[int | None], num_labels: int) -> Floats:
    rows = np.zeros((len(indices), num_labels))
    for row, index in zip(rows, indices, strict=True):
        if index is not None:
            row[index] = 1.0
    return rows


def _index(labels: Sequence[str], text: str, *, lenient: bool) -> int | None:
    return next((i for i, label in enumerate(labels) if is_same(text, label, lenient=lenient)), None)


def _rouge_scorer() -> Any:
    return _import("rouge-score", "rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)


def _sentence_bleu() -> Callable[[str, list[str]], Any]:
    bleu = _import("sacrebleu", "sacrebleu.metrics").BLEU(effective_order=True)
    score: Callable[[str, list[str]], Any] = bleu.sentence_score
    return score


def _import(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise ConfigurationError(
            f"Written text is measured by {package}, which cannot be imported: {exc}.",
            remedy='Install it with `pip install "prelude-server[train]"`.',
        ) from exc
