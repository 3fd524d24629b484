"""What rules make of logits: penalties and biases row by row, then the filters of sampling for all rows at once.

The order is transformers': penalties, biases, what must not come, temperature, top-k, top-p, min-p, typical-p.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import numpy as np
import torch

from server.core import SamplingParams
from server.engine.sequence import Sequence
from server.engine.upload import upload

NEVER = float("-inf")


def changes_logits(sequence: Sequence) -> bool:
    """Whether rules change a row before its best token is looked for."""
    params = sequence.sampling
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or sequence.walk is not None
        or len(sequence.output_ids) < params.min_new_tokens
    )


def apply_rules(row: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
    """Penalties, biases, and what may not come next; in place on `[vocab_size]`."""
    _penalise(row, sequence)
    params = sequence.sampling
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        row.index_add_(0, on_device(row.device, ids), on_device(row.device, biases).to(row.dtype))
    if sequence.walk is not None:  # it knows better than `min_new_tokens` when there may be an end
        row.masked_fill_(~on_device(row.device, sequence.walk.allowed(len(row))), NEVER)
    elif len(sequence.output_ids) < params.min_new_tokens:
        ends = sorted(eos_token_ids | params.stop_token_ids)
        if ends:
            row.index_fill_(0, on_device(row.device, ends), NEVER)


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    params = sequence.sampling
    if params.repetition_penalty != 1.0 and sequence.seen_ids:
        seen = on_device(row.device, sorted(sequence.seen_ids))
        scores, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if sequence.output_counts:
        counts = sorted(sequence.output_counts.items())
        penalties = [params.presence_penalty + params.frequency_penalty * count for _, count in counts]
        ids = on_device(row.device, [token_id for token_id, _ in counts])
        row.index_add_(0, ids, on_device(row.device, penalties).to(row.dtype), alpha=-1)


def probabilities(logits: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    """What each row is drawn from: `[rows, vocab_size]` in float64, zero where a filter leaves a token out."""

    def each(value: Callable[[SamplingParams], float]) -> torch.Tensor:
        return on_device(logits.device, [value(p) for p in params])

    scaled = logits / each(lambda p: p.temperature).to(logits.dtype)[:, None]
    scaled = _keep_top_k(scaled, [p.top_k for p in params])
    kept = scaled.softmax(dim=-1, dtype=torch.float64)
    if any(p.top_p < 1.0 for p in params):
        kept = _keep_top_p(kept, each(lambda p: p.top_p))
    if any(p.min_p > 0.0 for p in params):
        least = kept.max(dim=-1, keepdim=True).values * each(lambda p: p.min_p)[:, None]
        kept = kept.masked_fill(kept < least, 0.0)
    if any(p.typical_p < 1.0 for p in params):
        kept = _keep_typical(kept, each(lambda p: p.typical_p))
    return kept


def _keep_top_k(scaled: torch.Tensor, wanted: Rows[int]) -> torch.Tensor:
    vocab_size, device = scaled.shape[1], scaled.device
    top_k = [min(k or vocab_size, vocab_size) for k in wanted]
    if min(top_k) == vocab_size:
        return scaled
    most = max(k for k in top_k if k < vocab_size)
    values = scaled.topk(most, dim=-1).values
    kth = on_device(device, [min(k, most) - 1 for k in top_k])[:, None]
    limited = on_device(device, [k < vocab_size for k in top_k])[:, None]
    return scaled.masked_fill(limited & (scaled < values.gather(1, kth)), NEVER)


def _keep_top_p(kept: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest set of tokens that reaches `top_p` (Holtzman et al. 2020); the best always stays."""
    ordered, index = kept.sort(dim=-1, descending=True)
    return _drop_behind(kept, ordered, index, top_p)


def _keep_typical(kept: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The tokens whose surprise is nearest to the entropy, until they reach `mass` (Meister et al. 2022)."""
    kept = kept / kept.sum(dim=-1, keepdim=True)
    surprise = -kept.log()
    entropy = (kept * surprise).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)
    index = (surprise - entropy).abs().argsort(dim=-1, stable=True)
    return _drop_behind(kept, kept.gather(1, index), index, mass)


def _drop_behind(kept: torch.Tensor, ordered: torch.Tensor, index: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Zero the tokens before which, in this order, the mass is reached; the first always stays, and at 1 all do."""
    before = ordered.cumsum(dim=-1) - ordered
    dropped = (before >= mass[:, None]) & (mass < 1.0)[:, None]
    dropped[:, 0] = False
    return kept.masked_fill(torch.zeros_like(dropped).scatter(1, index, dropped), 0.0)


def on_device(device: torch.device, values: Rows[int] | Rows[float] | Rows[bool] | np.ndarray) -> torch.Tensor:
    """Values of the host as a tensor `[n]` where the logits are."""
    return upload([np.asarray(values)], device)[0]
