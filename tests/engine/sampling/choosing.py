"""A choice of tokens that waits for its result."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from server.engine.fast.operators import Operators
from server.engine.sampling.sampler import NextToken, begin_choosing
from server.engine.scheduling.sequence import Sequence
from server.engine.to_device import Download


def choose_next(
    logits: torch.Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int], operators: Operators | None = None
) -> list[NextToken]:
    """A token for each row of `logits`."""
    return begin_choosing(logits, sequences, eos_token_ids, Download(), operators)()
