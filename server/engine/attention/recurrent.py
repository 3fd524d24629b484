"""Recurrent states in serving: one state of a fixed size for each running sequence, beside its keys and values.

Some layers keep the last inputs of a short convolution, or the matrix of a linear attention. A sequence's states of all
such layers form one row of numbers. A state summarises all tokens so far: unlike keys and values, it cannot be
truncated to fewer tokens, and computing a token twice would count it twice. Therefore:

- Prefixes and copies of inputs contain the state at exactly their end, so chunks end there (`scheduler.py`).
- A step's new states are stored only after the step has succeeded (`state_pool.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from server.engine.attention.cached_rows import Span
from server.engine.attention.interface import AttentionRules, Layout, Recurrence, StateSlice
from server.engine.memory.state_pool import StatePool
from server.engine.to_device import upload


class ServingRows(Layout, Protocol):
    """A serving layout."""

    position_ids: torch.Tensor


class RecurrentRows:
    """A serving layout with the recurrent states of its sequences; see `interface.RecurrentLayout`.

    Decoding sequences are computed as one batch, prefill chunks one by one.
    """

    def __init__(self, rows: ServingRows, pool: StatePool, spans: Sequence[Span]) -> None:
        """Lay out a step, whose spans are in the order of the flat row; `rows` is the layout for attention."""
        self.position_ids = rows.position_ids
        self._layout, self._pool = rows, pool
        (self._rows,) = upload([pool.rows_of(span.slot for span in spans)], pool.states.device)
        self._sequences: list[int] = []  # sequences of each batch
        self._tokens: list[int] = []
        are_single = False
        for span in spans:
            if are_single and span.count == 1:
                self._sequences[-1] += 1
                self._tokens[-1] += 1
            else:
                self._sequences.append(1)
                self._tokens.append(span.count)
            are_single = span.count == 1

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        return self._layout.attend(layer, query, key, value, rules)

    def recur(self, state_slice: StateSlice, inputs: torch.Tensor, recurrence: Recurrence) -> torch.Tensor:
        states = torch.split(self._pool.read(state_slice, self._rows), self._sequences)
        outs, after = [], []
        for part, before in zip(torch.split(inputs, self._tokens), states, strict=True):
            out, state = recurrence(part.view(len(before), -1, part.shape[-1]), before)
            outs.append(out.flatten(0, 1))
            after.append(state)
        self._pool.keep(state_slice, self._rows, torch.cat(after))
        return torch.cat(outs)
