"""The next token of every row that has logits, each row under its own rules.

A batch of greedy rows costs one argmax over logits as the model gives them. The order of the others is text-generation-
inference's and transformers': repetition penalty, end tokens, temperature, top-k, top-p, then a draw. A draw is one
uniform number from the sequence's own generator, looked up in the row's cumulative distribution: it depends on the seed
and on how many tokens came before, not on the neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.operators import Operators, at_least_float32
from server.engine.sequence import Sequence
from server.engine.upload import upload


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's next token. `token_id` is None where the logits are not finite, so that nothing can be chosen."""

    token_id: int | None
    logprob: float | None


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
    return _choose_by_rules(at_least_float32(logits), sequences, eos_token_ids)


def _has_rules(sequence: Sequence) -> bool:
    return not sequence.sampling.is_greedy or sequence.sampling.logprobs or _changes_logits(sequence)


def _choose_by_rules(logits: torch.Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int]) -> list[Choice]:
    ruled = [i for i, sequence in enumerate(sequences) if _changes_logits(sequence)]
    if ruled:
        index = _on(logits.device, ruled)
        rows = logits[index]
        for row, i in zip(rows, ruled, strict=True):
            _apply_penalties(row, sequences[i], eos_token_ids)
        adjusted = logits.index_copy(0, index, rows)
    else:
        adjusted = logits
    # NaN is the largest value to max(), so one pass finds both the best token and a row that cannot be used.
    best, chosen = adjusted.max(dim=-1)
    drawn = [i for i, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
    if drawn:
        index = _on(logits.device, drawn)
        chosen.index_copy_(0, index, _draw(adjusted[index], [sequences[i] for i in drawn]))
    tokens = torch.where(torch.isfinite(best), chosen, -1).tolist()  # see above
    logprobs = _logprobs(logits, chosen, sequences)
    return [
        Choice(token, logprob) if token >= 0 else Choice(None, None)
        for token, logprob in zip(tokens, logprobs, strict=True)
    ]


def _on(device: torch.device, values: Rows[int] | Rows[float] | Rows[bool]) -> torch.Tensor:
    return upload([np.array(values)], device)[0]


def _changes_logits(sequence: Sequence) -> bool:
    params = sequence.sampling
    return params.repetition_penalty != 1.0 or len(sequence.output_ids) < params.min_new_tokens


def _apply_penalties(row: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
    """Repetition penalty over the tokens seen, and no end token before `min_new_tokens`; in place on `[vocab_size]`."""
    params = sequence.sampling
    if params.repetition_penalty != 1.0 and sequence.seen_ids:
        seen = _on(row.device, sorted(sequence.seen_ids))
        scores = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if len(sequence.output_ids) < params.min_new_tokens:
        row.index_fill_(0, _on(row.device, sorted(eos_token_ids)), float("-inf"))


def _draw(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Draw one token per row, `[rows]`, after temperature, top-k and top-p."""
    device = logits.device
    params = [sequence.sampling for sequence in sequences]
    temperature = _on(device, [p.temperature for p in params]).to(logits.dtype)
    scaled = logits / temperature[:, None]
    vocab_size = scaled.shape[1]
    top_k = [min(p.top_k or vocab_size, vocab_size) for p in params]
    if min(top_k) < vocab_size:
        most = max(k for k in top_k if k < vocab_size)
        values = scaled.topk(most, dim=-1).values
        kth = _on(device, [min(k, most) - 1 for k in top_k])[:, None]
        limited = _on(device, [k < vocab_size for k in top_k])[:, None]
        scaled = scaled.masked_fill(limited & (scaled < values.gather(1, kth)), float("-inf"))
    probabilities = scaled.softmax(dim=-1, dtype=torch.float64)
    if any(p.top_p < 1.0 for p in params):
        probabilities = _keep_top_p(probabilities, _on(device, [p.top_p for p in params]))
    cumulative = probabilities.cumsum(dim=-1)
    uniform = _on(device, [sequence.rng.random() for sequence in sequences])[:, None]
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    # Rounding can put the draw behind the last token that has any probability; step back onto it.
    last = vocab_size - 1 - (probabilities.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(drawn, last)


def _keep_top_p(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of tokens that reaches `top_p` (Holtzman et al. 2020); the best always stays."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    dropped = (before >= top_p[:, None]).scatter(1, index, before >= top_p[:, None])
    dropped.scatter_(1, index[:, :1], False)
    return probabilities.masked_fill(dropped, 0.0)


def _logprobs(logits: torch.Tensor, chosen: torch.Tensor, sequences: Rows[Sequence]) -> list[float | None]:
    """Log-probability of each chosen token under the model's own distribution, for the rows that report it."""
    wanted = [i for i, sequence in enumerate(sequences) if sequence.sampling.logprobs]
    found: list[float | None] = [None] * len(sequences)
    if wanted:
        index = _on(logits.device, wanted)
        rows = logits[index]
        values = rows.gather(1, chosen[index][:, None]).squeeze(1) - rows.logsumexp(dim=-1)
        for i, value in zip(wanted, values.tolist(), strict=True):
            found[i] = value
    return found
