"""Objectives: targets, or the frozen model's own distributions after a longer text (distillation).

A lesson is what stays together in a batch: one row with its target, or one row with all labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from server.train.data import Example


@dataclass(frozen=True, slots=True)
class TokenShares:
    """The teacher's probabilities at each position of a target: the likeliest tokens, and the sum of the rest."""

    ids: torch.Tensor
    """`[target tokens, kept]`."""
    logprobs: torch.Tensor
    """The same shape."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What stays together in a batch."""

    examples: tuple[Example, ...]
    tokens: TokenShares | None = None
    """The teacher's view of the only example's target."""
    labels: torch.Tensor | None = None
    """The teacher's log-probabilities `[labels]` of the examples' targets, among each other."""

    @property
    def num_fed(self) -> int:
        """Tokens that are fed."""
        return sum(len(example.fed_ids) for example in self.examples)


class Objective(Protocol):
    """An objective: the loss to minimise, and which answers count as correct."""

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, lessons: Sequence[Lesson]) -> torch.Tensor:
        """Losses in nats, one dimension, whose mean is minimised.

        Args:
            logits: `[target tokens, vocab_size]` of all examples of all lessons, in order.
            targets: `[target tokens]`.
            lessons: whose they are.
        """
        ...

    def hits(self, logits: torch.Tensor, targets: torch.Tensor, lessons: Sequence[Lesson]) -> int:
        """Number of lessons with the correct answer."""
        ...


class Targets:
    """Cross-entropy of the targets' tokens, the end token included."""

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, lessons: Sequence[Lesson]) -> torch.Tensor:
        """See `Objective`: one of each token."""
        return F.cross_entropy(logits, targets, reduction="none")

    def hits(self, logits: torch.Tensor, targets: torch.Tensor, lessons: Sequence[Lesson]) -> int:
        """Number of rows in which every target token is the likeliest one: greedy decoding produces the target."""
        same = logits.argmax(dim=-1) == targets
        lengths = [len(lesson.examples[0].target_ids) for lesson in lessons]
        return sum(bool(row.all()) for row in torch.split(same, lengths))


class TeacherTokens(Targets):
    """Kullback-Leibler divergence from the teacher's distributions (Hinton et al. 2015), token by token.

    A hit is a row for which greedy decoding gives the teacher's answer.
    """

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, lessons: Sequence[Lesson]) -> torch.Tensor:
        """See `Objective`: one of each token."""
        views = [lesson.tokens for lesson in lessons if lesson.tokens is not None]
        ids = torch.cat([view.ids for view in views]).to(logits.device)
        teacher = torch.cat([view.logprobs for view in views]).to(logits.device)
        student = F.log_softmax(logits, dim=-1).gather(1, ids)
        kept = (teacher.exp() * (teacher - student)).sum(dim=-1)
        return kept + _rest(teacher).exp() * (_rest(teacher) - _rest(student))


class TeacherLabels:
    """Kullback-Leibler divergence from the teacher's probabilities of whole labels. A hit is the same best label."""

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, lessons: Sequence[Lesson]) -> torch.Tensor:
        """See `Objective`: one of each row."""
        pairs = self._pairs(logits, targets, lessons)
        return torch.stack([(teacher.exp() * (teacher - student)).sum() for teacher, student in pairs])

    def hits(self, logits: torch.Tensor, targets: torch.Tensor, lessons: Sequence[Lesson]) -> int:
        """See `Objective`."""
        pairs = self._pairs(logits, targets, lessons)
        return sum(int(teacher.argmax() == student.argmax()) for teacher, student in pairs)

    @staticmethod
    def _pairs(
        logits: torch.Tensor, targets: torch.Tensor, lessons: Sequence[Lesson]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each row, the labels' log-probabilities by the teacher and by the student."""
        shares = split_labels(-F.cross_entropy(logits, targets, reduction="none"), lessons)
        return [
            (lesson.labels.to(logits.device), student)
            for lesson, student in zip(lessons, shares, strict=True)
            if lesson.labels is not None
        ]


def split_labels(logprobs: torch.Tensor, lessons: Sequence[Lesson]) -> list[torch.Tensor]:
    """For each lesson, log-probabilities normalised over its labels, from those of the labels' tokens."""
    lengths = [len(example.target_ids) for lesson in lessons for example in lesson.examples]
    totals = torch.stack([tokens.sum() for tokens in torch.split(logprobs, lengths)])
    rows = torch.split(totals, [len(lesson.examples) for lesson in lessons])
    return [F.log_softmax(row, dim=-1) for row in rows]


def _rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probability `[tokens]` of all tokens except the given ones `[tokens, kept]`."""
    share = logprobs.exp().sum(dim=-1).clamp(max=1 - 1e-6)
    return torch.log1p(-share)
