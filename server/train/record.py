"""What a run says of itself: after each step, at each measurement, and at its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Score:
    """Teacher-forced quality on a set of rows."""

    loss: float
    """Mean of the objective, in nats: of targets, cross-entropy per token."""
    exact_match: float
    """Share of rows whose every target token, the end token included, is the most likely one: exactly the rows that
    greedy decoding answers with the target. In distillation: rows with the teacher's answer, or its best label."""

    @property
    def rank(self) -> tuple[float, float]:
        """More is better."""
        return self.exact_match, -self.loss


@dataclass(frozen=True)
class Progress:
    """What a step tells whoever watches."""

    step: int
    loss: float
    tokens_per_second: float
    validation: Score | None = None


@dataclass(frozen=True)
class Measured:
    """One measurement on the way."""

    step: int
    training_loss: float
    score: Score


@dataclass(frozen=True)
class TrainingResult:
    """What was learned, and how it scored."""

    tensors: dict[str, torch.Tensor]
    """By PEFT's names, in float32."""
    step: int
    """After which it was the best."""
    validation: Score
    history: tuple[Measured, ...] = ()

    @property
    def prompt_embeddings(self) -> torch.Tensor:
        """The tensor that every method has."""
        return self.tensors["prompt_embeddings"]
