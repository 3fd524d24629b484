"""The result of sampling for each row of logits."""

from __future__ import annotations

from typing import NamedTuple

from server.contracts import Candidate


class NextToken(NamedTuple):
    """A row's next token. `token_id` is None if the logits are not finite."""

    token_id: int | None
    logprob: float | None
    top: tuple[Candidate, ...] = ()
