"""The result of sampling for each row of logits."""

from __future__ import annotations

from typing import NamedTuple

from server.contracts import Candidate


class NextToken(NamedTuple):
    """A row's next token. `token_id` is None where the logits are not finite, so that nothing can be chosen."""

    token_id: int | None
    logprob: float | None
    top: tuple[Candidate, ...] = ()
