"""The next token of every row that has logits, each row under its own rules.

A batch of plain greedy rows costs one argmax over logits as the model gives them. What the rules make of the others is
in `distribution.py`. A draw is one uniform number from the sequence's own generator, looked up in the row's cumulative
distribution: it depends on the seed and on how many tokens came before, not on the neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from server.core import Candidate
from server.engine.distribution import apply_rules, changes_logits, on_device, probabilities
from server.engine.operators import Operators, at_least_float32
from server.engine.sequence import Sequence

ROWS_AT_ONCE = 64
"""Rows whose rules are applied in one go: drawing takes several copies of them in float64. Choices that share their
input draw from it before they have a slot, so there can be many more rows than sequences that run."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's next token. `token_id` is None where the logits are not finite, so that nothing can be chosen."""

    token_id: int | None
    logprob: float | None
    top: tuple[Candidate, ...] = ()


def choose_next(
    logits: torch.Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int], operators: Operators | None = None
) -> list[Choice]:
    """Choose a token for each row of `logits` `[rows, vocab_size]`, which it does not change.

    Args:
        logits: in any dtype; rules are applied in float32 or float64.
        sequences: whose rows they are.
        eos_token_ids: tokens that end a generation.
        operators: how to find the best token; torch's way if it is None.
    """
    if not any(map(_has_rules, sequences)):
        best, chosen = (operators or Operators()).best(logits)
        # -1 marks a row that cannot be used, so that the host waits for one copy only.
        tokens = torch.where(torch.isfinite(best), chosen, -1).tolist()
        return [Choice(token if token >= 0 else None, None) for token in tokens]
    choices: list[Choice] = []
    for first in range(0, len(sequences), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        choices += _choose_by_rules(at_least_float32(logits[rows]), sequences[rows], eos_token_ids)
    return choices


def _has_rules(sequence: Sequence) -> bool:
    return not sequence.is_plain or len(sequence.output_ids) < sequence.sampling.min_new_tokens


def _choose_by_rules(logits: torch.Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int]) -> list[Choice]:
    ruled = [i for i, sequence in enumerate(sequences) if changes_logits(sequence)]
    adjusted = logits
    if ruled:
        index = on_device(logits.device, ruled)
        rows = logits[index]
        for row, i in zip(rows, ruled, strict=True):
            try:
                apply_rules(row, sequences[i], eos_token_ids)
            except Exception as exc:  # noqa: BLE001 - its request ends by it, and no other
                sequences[i].error = exc
                row.fill_(float("nan"))
        adjusted = logits.index_copy(0, index, rows)
    # NaN is the largest value to max(), so one pass finds both the best token and a row that cannot be used.
    best, chosen = adjusted.max(dim=-1)
    drawn = [i for i, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
    if drawn:
        index = on_device(logits.device, drawn)
        chosen.index_copy_(0, index, _draw(adjusted[index], [sequences[i] for i in drawn]))
    tokens = torch.where(torch.isfinite(best), chosen, -1).tolist()  # see above
    reports = _report(logits, chosen, sequences)
    return [
        Choice(token, *report) if token >= 0 else Choice(None, None)
        for token, report in zip(tokens, reports, strict=True)
    ]


def _draw(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Draw one token per row, `[rows]`."""
    kept = probabilities(logits, [sequence.sampling for sequence in sequences])
    cumulative = kept.cumsum(dim=-1)
    uniform = on_device(logits.device, [sequence.rng.random() for sequence in sequences])[:, None]
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    # Rounding can put the draw behind the last token that has any probability; step back onto it.
    last = kept.shape[1] - 1 - (kept.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(drawn, last)


Report = tuple[float | None, tuple[Candidate, ...]]


def _report(logits: torch.Tensor, chosen: torch.Tensor, sequences: Rows[Sequence]) -> list[Report]:
    """What rows tell of their choice under the model's own distribution, where it was asked for."""
    reports: list[Report] = [(None, ())] * len(sequences)
    wanted = [i for i, sequence in enumerate(sequences) if sequence.sampling.logprobs]
    if wanted:
        index = on_device(logits.device, wanted)
        top = [sequences[i].sampling.top_logprobs for i in wanted]
        for i, report in zip(wanted, report_tokens(logits[index], chosen[index], top), strict=True):
            reports[i] = report
    return reports


def report_tokens(
    logits: torch.Tensor, tokens: torch.Tensor, num_top: Rows[int]
) -> list[tuple[float, tuple[Candidate, ...]]]:
    """Log-probabilities under the model's own distribution.

    Args:
        logits: `[rows, vocab_size]`, at least float32.
        tokens: `[rows]`, one token id of each row.
        num_top: of each row, how many of the most likely tokens to tell beside it.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    values = (logits.gather(1, tokens[:, None]) - total).squeeze(1).tolist()
    most = max(num_top, default=0)
    if not most:
        return [(value, ()) for value in values]
    found = logits.topk(most, dim=-1)
    ids, logprobs = found.indices.tolist(), (found.values - total).tolist()
    return [
        (value, tuple(map(Candidate, row_ids[:count], row_logprobs[:count])))
        for value, row_ids, row_logprobs, count in zip(values, ids, logprobs, num_top, strict=True)
    ]


def report_ranks(logits: torch.Tensor, tokens: torch.Tensor) -> list[int]:
    """How many tokens of each row are as likely as the given one, or likelier; that one counts itself.

    Args:
        logits: `[rows, vocab_size]`.
        tokens: `[rows]`, one token id of each row.
    """
    ranks: list[int] = (logits >= logits.gather(1, tokens[:, None])).sum(dim=-1).tolist()
    return ranks
