"""Chooses one of several texts by its probability after the input, for classification.

Every label is scored whole, so it does not matter that two begin alike or differ in length. Only if one label is the
beginning of another would it always win: then the end of the sequence is scored with all of them, as `prelude train`
teaches it behind every target.
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
    """What makes tokens of labels: a frozen model, or what others may ask of it (`ModelText`)."""

    @property
    def end_token_id(self) -> int | None:
        """The token that ends a text, as training puts it behind every target."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def encode_after_text(self, text: str) -> list[int]:
        """Token ids of a text that continues another."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A label, and what the model thinks of it."""

    text: str
    probability: float
    """Among the labels; those of all add up to 1."""
    logprob: float
    num_tokens: int


def encode_labels(model: Encodes, labels: Sequence[str], *, continue_text: bool = False) -> tuple[LabelIds, ...]:
    """Token ids of labels as training tokenises targets: apart from the input.

    Args:
        model: whose tokens they are to be.
        labels: their texts.
        continue_text: they continue the input instead, as the frozen model alone would.

    Raises:
        InvalidRequest: two labels are the same to the model.
    """
    encode = model.encode_after_text if continue_text else partial(model.encode, add_special_tokens=False)
    ids = [tuple(encode(label)) for label in labels]
    ordered = sorted(zip(ids, labels, strict=True))
    for (one, text), (other, twin) in itertools.pairwise(ordered):
        if one == other:
            raise InvalidRequest(
                f"The choices {text[:80]!r} and {twin[:80]!r} are the same tokens.", remedy="Send one."
            )
    # In lexical order a label is followed at once by one that it begins, if there is any.
    if any(other[: len(one)] == one for (one, _), (other, _) in itertools.pairwise(ordered)):
        end = model.end_token_id
        if end is not None:
            return tuple((*label, end) for label in ids)
    return tuple(ids)


def judge(labels: Sequence[str], scored: Sequence[Sequence[Scored]], *, length_normalized: bool) -> list[Judged]:
    """What the log-probabilities of labels' tokens say of the labels, in their order.

    Args:
        labels: their texts.
        scored: of each its tokens.
        length_normalized: compare means instead of sums: longer labels then lose nothing by their length alone.
    """
    totals = [math.fsum(token.logprob or 0.0 for token in tokens) for tokens in scored]
    weights = [
        total / len(tokens) if length_normalized else total for total, tokens in zip(totals, scored, strict=True)
    ]
    best = max(weights)
    # All may be impossible; then nothing is known of them.
    shares = [math.exp(weight - best) if best > -math.inf else 1.0 for weight in weights]
    whole = math.fsum(shares)
    return [
        Judged(label, share / whole, total, len(tokens))
        for label, share, total, tokens in zip(labels, shares, totals, scored, strict=True)
    ]
