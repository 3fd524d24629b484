"""Why a sequence ends: a token that ends its text, or an error."""

from __future__ import annotations

import logging
import math

from server.contracts import FinishReason
from server.engine.sampling.sampler import NextToken
from server.engine.scheduling.sequence import Sequence
from server.errors import GenerationFailed, NotFinite

log = logging.getLogger(__name__)


def ending(sequence: Sequence, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
    """The finish reason if this token itself ends the text (end token, stop token id), else None."""
    params = sequence.sampling
    if token_id in eos_token_ids and (sequence.walk is not None or not params.ignore_eos):
        return FinishReason.EOS_TOKEN
    is_early = len(sequence.output_ids) < params.min_new_tokens  # only a grammar lets it come so soon
    return FinishReason.STOP_SEQUENCE if token_id in params.stop_token_ids and not is_early else None


def failure(sequence: Sequence, drawn: list[tuple[Sequence, NextToken]], prefix_is_finite: bool) -> Exception | None:
    """The error that ends a sequence after a step, or None."""
    is_finite = prefix_is_finite
    for choice, token in drawn:
        if choice.error is not None:
            log.error("the rules of a request fail; no other is affected", exc_info=choice.error)
            return GenerationFailed("The engine failed on this request; no other is affected.")
        is_finite &= token.token_id is not None
    if is_finite and not any(math.isnan(scored.logprob or 0.0) for scored in sequence.scored):
        return None
    return NotFinite("The model's output is not finite for this soft prompt and input.")
