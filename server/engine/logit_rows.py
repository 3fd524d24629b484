"""Which rows of a step have logits that somebody wants, and for what: the next token, or how likely a given one was."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from server.core import Scored
from server.engine.distribution import on_device
from server.engine.layout import Span
from server.engine.operators import at_least_float32
from server.engine.sampler import ROWS_AT_ONCE, report_ranks, report_tokens
from server.engine.sequence import Sequence

Batch = list[tuple[Sequence, Span]]


@dataclass
class LogitRows:
    """The wanted rows of a batch. Numbers are those of rows of logits, of which each wanted row of the step has one."""

    kept: np.ndarray
    """`[rows]`: where they lie in the step's flat row."""
    next_rows: list[int] = field(default_factory=list)
    """One for each choice that draws a token; choices that share their input draw from one row."""
    drawing: list[Sequence] = field(default_factory=list)
    """Whose draws those are."""
    labelled: list[tuple[int, Sequence]] = field(default_factory=list)
    """Rows that say how likely the first token of each label is."""
    scored: list[tuple[int, Sequence, int, int]] = field(default_factory=list)
    """First row, whose given tokens are scored by it and the next ones, the first of its `targets`, how many."""

    @classmethod
    def of(cls, batch: Batch) -> LogitRows:
        """Of the tokens of a flat row."""
        rows = cls(np.empty(0, dtype=np.int64))
        kept: list[int] = []
        first = 0  # of the share, in the flat row
        for sequence, span in batch:
            if sequence.targets:
                positions = sequence.scored_positions(span)
                if positions:
                    target = positions.start - sequence.first_target
                    rows.scored.append((len(kept), sequence, target, len(positions)))
                    kept.extend(range(first + positions.start - span.start, first + positions.stop - span.start))
            first += span.count
            if sequence.asks_for_next(span):
                rows._ask(sequence, len(kept))
                kept.append(first - 1)
        rows.kept = np.array(kept, dtype=np.int64)
        return rows

    def _ask(self, sequence: Sequence, row: int) -> None:
        if sequence.request.labels:
            self.labelled.append((row, sequence))
            return
        for drawing in (sequence, *sequence.siblings):
            self.next_rows.append(row)
            self.drawing.append(drawing)

    def next_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The rows to draw from, `[drawing, vocab_size]`."""
        if self.next_rows == list(range(len(logits))):  # usually all of them, as they are
            return logits
        return logits[on_device(logits.device, self.next_rows)]

    def score(self, logits: torch.Tensor) -> None:
        """Tell the sequences how likely their given tokens were, and their labels' first ones."""
        for row, sequence in self.labelled:
            firsts = [label[0] for label in sequence.request.labels]
            row_logits = at_least_float32(logits[row])
            found = row_logits[on_device(logits.device, firsts)] - row_logits.logsumexp(dim=-1)
            sequence.scored += map(Scored, firsts, found.tolist())
        for first, sequence, target, count in self.scored:
            for start in range(0, count, ROWS_AT_ONCE):
                stop = min(start + ROWS_AT_ONCE, count)
                targets = sequence.targets[target + start : target + stop]
                rows = at_least_float32(logits[first + start : first + stop])
                ids = on_device(logits.device, targets)
                top = max(sequence.request.input_top_logprobs, sequence.sampling.top_logprobs)
                reports = report_tokens(rows, ids, [top] * len(targets))
                ranks = [None] * len(targets) if sequence.label_ids else report_ranks(rows, ids)
                sequence.scored += [
                    Scored(token_id, *report, rank)
                    for token_id, report, rank in zip(targets, reports, ranks, strict=True)
                ]


def only_decodes(batch: Batch, rows: LogitRows) -> bool:
    """Whether all of a step's shares are one token that asks for what comes next."""
    return len(rows.kept) == len(batch) and all(
        span.count == 1 and sequence.asks_for_next(span) for sequence, span in batch
    )


def tokens_of(batch: Batch) -> tuple[list[int], list[tuple[int, torch.Tensor]]]:
    """Token ids of a step's flat row, and the virtual tokens in it, by their first row; their ids mean nothing."""
    ids: list[int] = []
    virtual: list[tuple[int, torch.Tensor]] = []
    for sequence, span in batch:
        n = sequence.num_virtual_tokens
        if span.start < n:
            assert sequence.soft_prompt is not None, "only a soft prompt has virtual tokens"
            rows = sequence.soft_prompt.tensor[span.start : min(span.end, n)]
            virtual.append((len(ids), rows))
            ids += [0] * len(rows)
        ids += [sequence.token_at(position) for position in range(max(span.start, n), span.end)]
    return ids, virtual
