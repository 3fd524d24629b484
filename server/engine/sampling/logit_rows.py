"""The rows of a step whose logits are needed, to choose the next token or to score a given one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from server.contracts import Scored
from server.engine.attention.cached_rows import Span
from server.engine.fast.operators import Operators, at_least_float32
from server.engine.sampling.sampler import in_parts, report_ranks, report_tokens, rows_of
from server.engine.scheduling.sequence import Sequence
from server.engine.to_device import Download, upload

Batch = list[tuple[Sequence, Span]]


@dataclass
class LogitRows:
    """The needed rows of a batch. "Row" numbers are rows of logits, one for each needed row of the step."""

    kept: np.ndarray  # [rows], the index of each row in the step's flat row
    next_rows: list[int] = field(default_factory=list)  # that each choice draws from; the same for a shared input
    drawing: list[Sequence] = field(default_factory=list)  # the sequences of those draws
    labelled: list[tuple[int, Sequence]] = field(default_factory=list)  # rows that score each label's first token
    only_decodes: bool = False  # whether every sequence of the step computes one token and draws the next one
    scored: list[tuple[int, Sequence, int, int]] = field(default_factory=list)
    """First row, sequence, index of its first target, and number of targets; consecutive rows score consecutive
    targets."""

    @classmethod
    def of(cls, batch: Batch) -> LogitRows:
        """The needed rows of a batch."""
        rows = cls(np.empty(0, dtype=np.int64))
        kept: list[int] = []
        num_last = 0  # spans whose last row is needed
        first = 0  # index of the span's first token in the flat row
        for sequence, span in batch:
            if sequence.scores_labels_in(span):
                num_last += span.end == sequence.num_input
                rows.labelled.append((len(kept), sequence))
                kept.append(first + sequence.num_input - 1 - span.start)
            if sequence.targets:
                positions = sequence.scored_positions(span)
                if positions:
                    target = positions.start - sequence.first_target
                    rows.scored.append((len(kept), sequence, target, len(positions)))
                    kept.extend(range(first + positions.start - span.start, first + positions.stop - span.start))
            first += span.count
            if sequence.needs_next_after(span):
                num_last += 1
                rows._draw(sequence, len(kept))
                kept.append(first - 1)
        rows.kept = np.array(kept, dtype=np.int64)
        rows.only_decodes = first == num_last == len(kept) == len(batch)
        return rows

    def _draw(self, sequence: Sequence, row: int) -> None:
        self.next_rows.append(row)
        self.drawing.append(sequence)
        if sequence.siblings:
            self.next_rows += [row] * len(sequence.siblings)
            self.drawing += sequence.siblings

    def score(self, logits: torch.Tensor, download: Download, operators: Operators) -> Callable[[], None]:
        """Score given tokens and labels' first tokens; the returned function hands the sequences their scores."""
        parts = [*self._score_labels(logits, download, operators), *self._score_targets(logits, download, operators)]

        def give() -> None:
            for part in parts:
                part()

        return give

    def _score_labels(
        self, logits: torch.Tensor, download: Download, operators: Operators
    ) -> Iterator[Callable[[], None]]:
        """Score the first tokens of labels; one sum over a row serves all its labels."""
        for part in in_parts(len(self.labelled), logits):
            labelled = self.labelled[part]
            firsts = [[label[0] for label in sequence.request.labels] for _, sequence in labelled]
            lengths = list(map(len, firsts))
            of_row = np.repeat(np.arange(len(labelled)), lengths)
            row, token = upload([of_row, np.array([token for some in firsts for token in some])], logits.device)
            wanted = rows_of(logits, [row for row, _ in labelled])
            logprobs = download.add(at_least_float32(wanted[row, token]) - operators.log_totals(wanted)[row])
            yield _given([sequence for _, sequence in labelled], firsts, logprobs, download)

    def _score_targets(
        self, logits: torch.Tensor, download: Download, operators: Operators
    ) -> Iterator[Callable[[], None]]:
        """Score given tokens: labels' tokens, then inputs' tokens with ranks and the likeliest tokens."""
        rows = [
            _Target(sequence, first + i, sequence.targets[target + i])
            for first, sequence, target, count in self.scored
            for i in range(count)
        ]
        for of_labels in (True, False):
            group = [row for row in rows if bool(row.sequence.request.labels) == of_labels]
            for part in in_parts(len(group), logits):
                yield _score(group[part], logits, download, operators, with_ranks=not of_labels)


class _Target(NamedTuple):
    """A given token to score, and the row of logits that predicts it."""

    sequence: Sequence
    row: int
    token_id: int


def _score(
    targets: list[_Target], logits: torch.Tensor, download: Download, operators: Operators, *, with_ranks: bool
) -> Callable[[], None]:
    rows = rows_of(logits, [target.row for target in targets])
    [ids] = upload([np.array([target.token_id for target in targets])], logits.device)
    top = [max(one.request.input_top_logprobs, one.sampling.top_logprobs) for one, *_ in targets]
    reports = report_tokens(rows, ids, top, download, operators)
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
    """Token ids of a step's flat row, and its virtual tokens by first row; ids of virtual tokens have no meaning."""
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
