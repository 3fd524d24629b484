"""Chooses the label with the highest probability after the input, for classification.

Labels are scored as a whole, so they may begin alike or differ in length. Only a label that is the beginning of another
label would always win. In this case the end token, which `prelude train` puts after every target, is scored with all
labels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.contracts import Scored
from server.engine.text.model_text import ModelText
from server.errors import InvalidRequest

LabelIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """A label with its scores."""

    text: str
    probability: float
    """Probability among the labels; all labels' probabilities add up to 1."""
    logprob: float
    num_tokens: int


def encode_labels(model: ModelText, labels: Sequence[str], *, continue_text: bool = False) -> tuple[LabelIds, ...]:
    """Token ids of labels, tokenised separately from the input, as training tokenises targets.

    With `continue_text`, labels are tokenised as continuations of the input, as for the frozen model alone. Raises
    InvalidRequest for two labels with the same token ids.
    """
    ids = [model.encode_label(label, continue_text) for label in labels]
    ordered = sorted(zip(ids, labels, strict=True))
    for (one, text), (other, twin) in itertools.pairwise(ordered):
        if one == other:
            message = f"The choices {text[:80]!r} and {twin[:80]!r} are the same tokens."
            raise InvalidRequest(message, remedy="Send one.")
    # In lexical order, a label that is the beginning of others is directly followed by one of them.
    if any(other[: len(one)] == one for (one, _), (other, _) in itertools.pairwise(ordered)):
        ends = () if model.end_token_id is None else (model.end_token_id,)
        return tuple(label + ends for label in ids)
    return tuple(ids)


def judge(labels: Sequence[str], scored: Sequence[Sequence[Scored]], *, length_normalized: bool) -> list[Judged]:
    """Score labels by the log-probabilities of their tokens; keeps the order.

    With `length_normalized`, means are compared instead of sums, so that longer labels have no disadvantage.
    """
    totals = [math.fsum(token.logprob or 0.0 for token in tokens) for tokens in scored]
    lengths = [len(tokens) if length_normalized else 1 for tokens in scored]
    weights = [total / length for total, length in zip(totals, lengths, strict=True)]
    best = max(weights)
    # If all labels are impossible, they get equal probabilities.
    shares = [math.exp(weight - best) if best > -math.inf else 1.0 for weight in weights]
    whole = math.fsum(shares)
    return [
        Judged(label, share / whole, total, len(tokens))
        for label, share, total, tokens in zip(labels, shares, totals, scored, strict=True)
    ]
