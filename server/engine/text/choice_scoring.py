"""Chooses the label with the highest probability after the input, for classification.

Labels are scored as a whole, so they may begin alike or differ in length. Only a label that is the beginning of another
label would always win. In this case the end token, which `prelude train` puts after every target, is scored with all
labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from server.contracts import Scored
from server.errors import InvalidRequest

LabelIds = tuple[int, ...]


class Encodes(Protocol):
    """An encoder of labels, such as `ModelText`."""

    @property
    def end_token_id(self) -> int | None:
        """The token that ends a text; training puts it after every target."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def encode_after_text(self, text: str) -> list[int]:
        """Token ids of a text that continues another."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A label with its scores."""

    text: str
    probability: float
    """Probability among the labels; all labels' probabilities add up to 1."""
    logprob: float
    num_tokens: int


def encode_labels(model: Encodes, labels: Sequence[str], *, continue_text: bool = False) -> tuple[LabelIds, ...]:
    """Token ids of labels, tokenised separately from the input, as training tokenises targets.

    Args:
        model: encodes the labels.
        labels: the labels' texts.
        continue_text: tokenise labels as continuations of the input, as for the frozen model alone.

    Raises:
        InvalidRequest: two labels have the same token ids.
    """
    encode = model.encode_after_text if continue_text else partial(model.encode, add_special_tokens=False)
    ids = [tuple(encode(label)) for label in labels]
    ordered = sorted(zip(ids, labels, strict=True))
    for (one, text), (other, twin) in itertools.pairwise(ordered):
        if one == other:
            raise InvalidRequest(
                f"The choices {text[:80]!r} and {twin[:80]!r} are the same tokens.", remedy="Send one."
            )
    # In lexical order, a label that is the beginning of others is directly followed by one of them.
    if any(other[: len(one)] == one for (one, _), (other, _) in itertools.pairwise(ordered)):
        end = model.end_token_id
        if end is not None:
            return tuple((*label, end) for label in ids)
    return tuple(ids)


def judge(labels: Sequence[str], scored: Sequence[Sequence[Scored]], *, length_normalized: bool) -> list[Judged]:
    """Score labels by the log-probabilities of their tokens; keeps the order.

    Args:
        labels: the labels' texts.
        scored: the scored tokens of each label.
        length_normalized: compare means instead of sums, so that longer labels have no disadvantage.
    """
    totals = [math.fsum(token.logprob or 0.0 for token in tokens) for tokens in scored]
    weights = [
        total / len(tokens) if length_normalized else total for total, tokens in zip(totals, scored, strict=True)
    ]
    best = max(weights)
    # If all labels are impossible, they get equal probabilities.
    shares = [math.exp(weight - best) if best > -math.inf else 1.0 for weight in weights]
    whole = math.fsum(shares)
    return [
        Judged(label, share / whole, total, len(tokens))
        for label, share, total, tokens in zip(labels, shares, totals, scored, strict=True)
    ]
