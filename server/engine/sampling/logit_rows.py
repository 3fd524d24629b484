"""The rows of a step whose logits are needed: for the next token, or to score a given one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from server.contracts import Scored
from server.engine.attention.cached_rows import Span
from server.engine.fast.operators import at_least_float32
from server.engine.sampling.sampler import in_parts, report_ranks, report_tokens, rows_of
from server.engine.scheduling.sequence import Sequence
from server.engine.to_device import Download, upload

Batch = list[tuple[Sequence, Span]]


@dataclass
class LogitRows:
    """The wanted rows of a batch. Numbers are those of rows of logits, of which each wanted row of the step has one."""

    kept: np.ndarray
    """`[rows]`: where they lie in the step's flat row."""
    next_rows: list[int] = field(default_factory=list)
    """The row that each choice draws from; choices that share their input draw from one row."""
    drawing: list[Sequence] = field(default_factory=list)
    """Whose draws those are."""
    labelled: list[tuple[int, Sequence]] = field(default_factory=list)
    """Rows that say how likely the first token of each label is."""
    only_decodes: bool = False
    """Whether all of the step's shares are one token that asks for what comes next."""
    scored: list[tuple[int, Sequence, int, int]] = field(default_factory=list)
    """First row, whose given tokens are scored by it and the next ones, the first of its `targets`, how many."""

    @classmethod
    def of(cls, batch: Batch) -> LogitRows:
        """Of the tokens of a flat row."""
        rows = cls(np.empty(0, dtype=np.int64))
        kept: list[int] = []
        asking = 0
        first = 0  # of the share, in the flat row
        for sequence, span in batch:
            if sequence.targets:
                positions = sequence.scored_positions(span)
                if positions:
                    target = positions.start - sequence.first_target
                    rows.scored.append((len(kept), sequence, target, len(positions)))
                    kept.extend(range(first + positions.start - span.start, first + positions.stop - span.start))
            first += span.count
            if sequence.needs_next_after(span):
                asking += 1
                rows._ask(sequence, len(kept))
                kept.append(first - 1)
        rows.kept = np.array(kept, dtype=np.int64)
        rows.only_decodes = first == asking == len(kept) == len(batch)
        return rows

    def _ask(self, sequence: Sequence, row: int) -> None:
        if sequence.request.labels:
            self.labelled.append((row, sequence))
            return
        self.next_rows.append(row)
        self.drawing.append(sequence)
        if sequence.siblings:
            self.next_rows += [row] * len(sequence.siblings)
            self.drawing += sequence.siblings

    def score(self, logits: torch.Tensor, download: Download) -> Callable[[], None]:
        """Find how likely the given tokens were, and labels' first ones; the answer gives them to their sequences."""
        parts = [*self._score_labels(logits, download), *self._score_targets(logits, download)]

        def give() -> None:
            for part in parts:
                part()

        return give

    def _score_labels(self, logits: torch.Tensor, download: Download) -> Iterator[Callable[[], None]]:
        """Labels' first tokens, all those of a row from one sum over it."""
        for part in in_parts(len(self.labelled), logits):
            labelled = self.labelled[part]
            firsts = [[label[0] for label in sequence.request.labels] for _, sequence in labelled]
            lengths = list(map(len, firsts))
            of_row = np.repeat(np.arange(len(labelled)), lengths)
            row, token = upload([of_row, np.array([token for some in firsts for token in some])], logits.device)
            wanted = at_least_float32(rows_of(logits, [row for row, _ in labelled]))
            logprobs = download.add(wanted[row, token] - wanted.logsumexp(dim=-1)[row])
            yield _given([sequence for _, sequence in labelled], firsts, logprobs, download)

    def _score_targets(self, logits: torch.Tensor, download: Download) -> Iterator[Callable[[], None]]:
        """Given tokens: those of labels, then those of inputs, which also have ranks and likelier tokens."""
        rows = [
            _Target(sequence, first + i, sequence.targets[target + i])
            for first, sequence, target, count in self.scored
            for i in range(count)
        ]
        for of_labels in (True, False):
            group = [row for row in rows if bool(row.sequence.label_ids) == of_labels]
            for part in in_parts(len(group), logits):
                yield _score(group[part], logits, download, with_ranks=not of_labels)


class _Target(NamedTuple):
    """A given token that is to be scored, and the row of logits that saw it come."""

    sequence: Sequence
    row: int
    token_id: int


def _score(targets: list[_Target], logits: torch.Tensor, download: Download, *, with_ranks: bool) -> Callable[[], None]:
    rows = at_least_float32(rows_of(logits, [target.row for target in targets]))
    [ids] = upload([np.array([target.token_id for target in targets])], logits.device)
    top = [max(who.request.input_top_logprobs, who.sampling.top_logprobs) for who, *_ in targets]
    reports = report_tokens(rows, ids, top, download)
    ranks = download.add(report_ranks(rows, ids)) if with_ranks else None

    def give() -> None:
        found = [None] * len(targets) if ranks is None else download.array(ranks).tolist()
        for target, report, rank in zip(targets, reports(), found, strict=True):
            target.sequence.scored.append(Scored(target.token_id, *report, rank))

    return give


def _given(sequences: list[Sequence], tokens: list[list[int]], logprobs: int, download: Download) -> Callable[[], None]:
    def give() -> None:
        found = iter(download.array(logprobs).tolist())
        for sequence, some in zip(sequences, tokens, strict=True):
            sequence.scored += [Scored(token_id, next(found)) for token_id in some]

    return give


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
