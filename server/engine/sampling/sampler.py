"""Samples the next token of each row of logits, by the row's own parameters.

A batch of plain greedy rows takes one argmax over the model's logits. `filters.py` applies the rules of all other rows.
A draw looks up one uniform number, from the sequence's own generator, in the row's cumulative distribution. It depends
on the seed and the number of earlier tokens, not on other rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from server.contracts import Candidate
from server.engine.fast.operators import Operators, at_least_float32
from server.engine.sampling.filters import Changes, probabilities
from server.engine.scheduling.sequence import Sequence
from server.engine.to_device import Download, upload

Item = TypeVar("Item")

NUMBERS_AT_ONCE = {"cpu": 2**22}
"""Number of logits that are processed at a time, because drawing needs several copies in float64; on a CPU, as many as
fit into its caches. Choices that share an input draw from it before they have a slot, so there can be many more rows
than running sequences."""

DEVICE_NUMBERS_AT_ONCE = 2**25
"""The same for all other devices: 256 rows with a vocabulary of 128 thousand tokens."""


class NextToken(NamedTuple):
    """A row's next token. `token_id` is None if the logits are not finite."""

    token_id: int | None
    logprob: float | None
    top: tuple[Candidate, ...] = ()


def begin_choosing(
    logits: torch.Tensor,
    sequences: Rows[Sequence],
    eos_token_ids: frozenset[int],
    download: Download,
    operators: Operators | None = None,
    drawn_from: Rows[int] | None = None,
) -> Callable[[], list[NextToken]]:
    """Choose a token for each sequence without waiting; the returned function reads the choices from `download`.

    Args:
        logits: `[rows, vocab_size]` in any dtype, which stay as they are; rules are applied in float32 or float64.
        sequences: the sequences that draw.
        eos_token_ids: tokens that end a generation.
        download: transfers the results.
        operators: for rows of logits; torch's operators if None.
        drawn_from: the row of logits that each sequence draws from; by default its own.
    """
    operators = operators or Operators()
    rows = range(len(sequences)) if drawn_from is None else drawn_from
    plain, ruled = _sorted_out(sequences)
    parts: list[tuple[Rows[int], Callable[[], list[NextToken]]]] = []
    # Adjacent rows are read in place; other rows are copied, in parts.
    whole = [slice(None)] if plain and _as_run(_some(rows, plain)) is not None else in_parts(len(plain), logits)
    for part in whole:
        mine = rows_of(logits, _some(rows, plain[part]))
        parts.append((plain[part], _choose_best(mine, download, operators)))
    for part in in_parts(len(ruled), logits):
        mine, whose = rows_of(logits, _some(rows, ruled[part])), _some(sequences, ruled[part])
        parts.append((ruled[part], _choose_by_rules(mine, whose, eos_token_ids, download, operators)))
    if len(parts) == 1:
        return parts[0][1]

    def choices() -> list[NextToken]:
        found = [NextToken(None, None)] * len(sequences)
        for places, part in parts:
            for place, choice in zip(places, part(), strict=True):
                found[place] = choice
        return found

    return choices


def _sorted_out(sequences: Rows[Sequence]) -> tuple[Rows[int], Rows[int]]:
    """Split the sequences into plain greedy ones and those with rules."""
    ruled = [
        i
        for i, sequence in enumerate(sequences)
        if not sequence.is_plain or len(sequence.output_ids) < sequence.sampling.min_new_tokens
    ]
    everybody = range(len(sequences))
    if not ruled:
        return everybody, ()
    if len(ruled) == len(sequences):
        return (), everybody
    rest = set(ruled)
    return [i for i in everybody if i not in rest], ruled


def _some(items: Rows[Item], places: Rows[int]) -> Rows[Item]:
    """The items at these indices, which are distinct and ascending."""
    return items if len(places) == len(items) else [items[place] for place in places]


def rows_of(logits: torch.Tensor, rows: Rows[int]) -> torch.Tensor:
    """Some rows of logits: a view if they are adjacent, as they usually are, else a copy."""
    if (run := _as_run(rows)) is not None:
        return logits[run]
    return logits[upload([np.array(rows)], logits.device)[0]]


def _as_run(rows: Rows[int]) -> slice | None:
    """The rows as a slice, if they are consecutive."""
    first, last = rows[0], rows[0] + len(rows)
    return slice(first, last) if list(rows) == list(range(first, last)) else None


def rows_at_once(device: torch.device, vocab_size: int) -> int:
    """Number of rows of logits that are processed at a time."""
    return max(1, NUMBERS_AT_ONCE.get(device.type, DEVICE_NUMBERS_AT_ONCE) // vocab_size)


def in_parts(count: int, logits: torch.Tensor) -> Iterator[slice]:
    """Divide `count` rows, as wide as these logits, into parts of `rows_at_once` rows."""
    step = rows_at_once(logits.device, logits.shape[1])
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _choose_best(logits: torch.Tensor, download: Download, operators: Operators) -> Callable[[], list[NextToken]]:
    best, chosen = operators.best(logits)
    tokens = _tokens(best, chosen, download)
    return lambda: list(map(NextToken, tokens(), itertools.repeat(None)))


def _tokens(best: torch.Tensor, chosen: torch.Tensor, download: Download) -> Callable[[], list[int | None]]:
    """The chosen tokens; None for rows whose best logit is not finite."""
    numbers = download.add(best), download.add(chosen)

    def tokens() -> list[int | None]:
        best, chosen = map(download.array, numbers)
        found = chosen.tolist()
        finite = np.isfinite(best)
        return found if finite.all() else [token if ok else None for token, ok in zip(found, finite, strict=True)]

    return tokens


def _choose_by_rules(
    logits: torch.Tensor,
    sequences: Rows[Sequence],
    eos_token_ids: frozenset[int],
    download: Download,
    operators: Operators,
) -> Callable[[], list[NextToken]]:
    adjusted = logits
    if changes := Changes.of(sequences, logits.shape[1], eos_token_ids):
        adjusted = at_least_float32(logits).contiguous()
        if adjusted.data_ptr() == logits.data_ptr():
            adjusted = adjusted.clone()
        changes.apply(adjusted)
    best, chosen = operators.best(adjusted)
    drawn = [i for i, sequence in enumerate(sequences) if not sequence.is_greedy]
    if len(drawn) == len(sequences):
        chosen = _draw(at_least_float32(adjusted), sequences)
    elif drawn:
        [index] = upload([np.array(drawn)], logits.device)
        chosen.index_copy_(0, index, _draw(at_least_float32(adjusted[index]), [sequences[i] for i in drawn]))
    tokens = _tokens(best, chosen, download)
    reports = _report(logits, chosen, sequences, download, operators)
    if reports is None:
        return lambda: list(map(NextToken, tokens(), itertools.repeat(None)))

    def choices() -> list[NextToken]:
        return [
            NextToken(token, logprob, top) if token is not None else NextToken(None, None)
            for token, (logprob, top) in zip(tokens(), reports(), strict=True)
        ]

    return choices


def _draw(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Draw one token per row, `[rows]`."""
    kept, uniform = probabilities(logits, sequences)
    cumulative = kept.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    return drawn.clamp_(max=kept.shape[1] - 1)  # for rows that are not finite, whose tokens are discarded


Report = tuple[float | None, tuple[Candidate, ...]]


def _report(
    logits: torch.Tensor, chosen: torch.Tensor, sequences: Rows[Sequence], download: Download, operators: Operators
) -> Callable[[], list[Report]] | None:
    """Log-probabilities of choices under the model's own distribution, for rows that request them; None if none do."""
    wanted = [i for i, sequence in enumerate(sequences) if sequence.sampling.logprobs]
    if not wanted:
        return None
    if len(wanted) < len(sequences):
        [index] = upload([np.array(wanted)], logits.device)
        logits, chosen = logits[index], chosen[index]
    top = [sequences[i].sampling.top_logprobs for i in wanted]
    found = report_tokens(logits, chosen, top, download, operators)

    def reports() -> list[Report]:
        reported = dict(zip(wanted, found(), strict=True))
        return [reported.get(row, (None, ())) for row in range(len(sequences))]

    return reports


def report_tokens(
    logits: torch.Tensor, tokens: torch.Tensor, num_top: Rows[int], download: Download, operators: Operators
) -> Callable[[], list[tuple[float, tuple[Candidate, ...]]]]:
    """Start computing log-probabilities under the model's own distribution; the returned function reads them.

    Args:
        logits: `[rows, vocab_size]` in any dtype.
        tokens: `[rows]`, one token id of each row.
        num_top: for each row, the number of most likely tokens to report too.
        download: transfers the results.
        operators: adds up rows of logits.
    """
    total = download.add(operators.log_totals(logits))
    own = download.add(at_least_float32(logits.gather(1, tokens[:, None])))
    most = max(num_top, default=0)
    if most:
        found = at_least_float32(logits).topk(most, dim=-1)
        best, ids = download.add(found.values), download.add(found.indices)

    def reports() -> list[tuple[float, tuple[Candidate, ...]]]:
        totals = download.array(total)[:, None]
        values = (download.array(own) - totals)[:, 0].tolist()
        if not most:
            return [(value, ()) for value in values]
        logprobs = (download.array(best) - totals).tolist()
        return [
            (value, tuple(map(Candidate, row_ids[:count], row_logprobs[:count])))
            for value, row_ids, row_logprobs, count in zip(
                values, download.array(ids).tolist(), logprobs, num_top, strict=True
            )
        ]

    return reports


def report_ranks(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The rank `[rows]` of each given token `[rows]`: the number of tokens at least as likely, including itself."""
    return (logits >= logits.gather(1, tokens[:, None])).sum(dim=-1)
