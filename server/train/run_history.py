"""The history of a run: each step, each evaluation, and its end."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TELLING_MATCHES = 0.1
"""If no evaluation reaches this share of exact matches, exact match is treated as chance."""


@dataclass(frozen=True)
class TeacherForcedScore:
    """Teacher-forced quality on a set of rows."""

    loss: float
    """Mean of the objective, in nats: of targets, cross-entropy per token."""
    exact_match: float
    """Share of rows whose every target token, the end token included, is the most likely one: exactly the rows that
    greedy decoding answers with the target. In distillation: rows with the teacher's answer, or its best label."""


@dataclass(frozen=True)
class TrainingProgress:
    """What a step reports to observers."""

    step: int
    loss: float
    tokens_per_second: float
    validation: TeacherForcedScore | None = None


@dataclass(frozen=True)
class Measured:
    """One measurement on the way."""

    step: int
    training_loss: float
    score: TeacherForcedScore


def best_of(history: Sequence[Measured]) -> int:
    """The place of the best measurement: the earliest of equals.

    If some evaluation reaches TELLING_MATCHES (labels, calls, queries), exact match decides, and the loss decides ties.
    A free text is hardly ever reproduced word for word, so its exact match is mostly chance, and the loss alone
    decides.
    """
    decides_by_matches = max(measured.score.exact_match for measured in history) >= TELLING_MATCHES

    def rank(index: int) -> tuple[float, float]:
        score = history[index].score
        return score.exact_match if decides_by_matches else 0.0, -score.loss

    return max(range(len(history)), key=rank)


@dataclass(frozen=True)
class TrainingResult:
    """What was learned, and how it scored."""

    tensors: dict[str, torch.Tensor]
    """By PEFT's names, in float32."""
    step: int
    """The step after which the state was best."""
    validation: TeacherForcedScore
    history: tuple[Measured, ...] = ()

    @property
    def prompt_embeddings(self) -> torch.Tensor:
        """The tensor that every method has."""
        return self.tensors["prompt_embeddings"]
