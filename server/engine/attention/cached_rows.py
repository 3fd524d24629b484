"""The layout of a serving step: where each token's keys and values are stored, and what each token attends to.

Decoding sequences in neighbouring slots attend as one batch; prefill chunks attend one by one. All read the pool in
place, without gathering. This implementation uses torch's operators and works with any device and dtype;
`varlen_rows.py` and `compiled_rows.py` are faster where they can be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from server.engine.attention.interface import AttentionRules, attend_batch, fold_mask, visibility
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.slots import Slot
from server.engine.to_device import upload


@dataclass(slots=True, unsafe_hash=True)
class Span:
    """One sequence's part of a step: `count` tokens from position `start` on. Treat it as immutable.

    It is not a frozen dataclass, because creating one takes three times as long, and a step creates one for each
    sequence.
    """

    slot: Slot
    start: int
    count: int
    prefix: int = 0
    """`Computed.number` of the prefix in the slot: slots with the same number begin with the same bits. 0: none."""
    prefix_length: int = 0
    """Number of positions of that prefix."""

    @property
    def end(self) -> int:
        """Number of the sequence's positions that are filled after the step."""
        return self.start + self.count


@dataclass(frozen=True)
class TokenPositions:
    """The positions of a step's tokens, computed on the host; each array is `[tokens]`."""

    position_ids: np.ndarray
    """Each token's position in its own sequence."""
    pool_positions: np.ndarray
    """Each token's position in the pool, where its keys and values are stored."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> TokenPositions:
        """The positions of the tokens of a flat row."""
        starts, firsts, counts = np.array([(s.slot.start, s.start, s.count) for s in spans], dtype=np.int64).T
        rows = np.arange(counts.sum())
        position_ids = rows + np.repeat(firsts - (counts.cumsum() - counts), counts)
        return cls(position_ids, position_ids + np.repeat(starts, counts))


@dataclass
class _Group:
    """Rows of the flat row that attend in one call: a run of neighbouring slots with one token each, or one chunk."""

    first_row: int
    spans: list[Span]
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + sum(span.count for span in self.spans))

    @property
    def key_length(self) -> int:
        return max(span.end for span in self.spans)

    def takes(self, span: Span) -> bool:
        """True if the span continues this run: it has one token, in the slot directly after the last span's slot."""
        last = self.spans[-1]
        neighbour = span.slot.length == last.slot.length and span.slot.start == last.slot.start + last.slot.length
        return neighbour and span.count == last.count == 1


class CachedRows:
    """Serving layout over a KV cache; see `interface.Layout`."""

    def __init__(self, kv_cache: KVCache, spans: Sequence[Span]) -> None:
        """Lay out a step; in the flat row, decoding spans come first, sorted by slot so that they form runs."""
        self._kv_cache = kv_cache
        token_positions = TokenPositions.of(spans)
        self.position_ids, self._pool_positions = upload(
            [token_positions.position_ids, token_positions.pool_positions], kv_cache.states.device
        )
        self._groups: list[_Group] = []
        row = 0
        for span in spans:
            if self._groups and self._groups[-1].takes(span):
                self._groups[-1].spans.append(span)
            else:
                self._groups.append(_Group(row, [span]))
            row += span.count

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        self._kv_cache.write(layer, self._pool_positions, key, value)
        heads, tokens, dim = query.shape
        out = query.new_empty(tokens, heads, dim)
        for group in self._groups:
            first, batch = group.spans[0], len(group.spans)
            keys, values = self._kv_cache.read(layer, first.slot.start, batch, first.slot.length, group.key_length)
            queries = query[:, group.rows].reshape(heads, batch, first.count, dim).transpose(0, 1)
            mask = self._mask(group, rules.sliding_window, heads // key.shape[0], query.dtype)
            attended = attend_batch(queries, keys, values, mask, rules)  # (batch, heads, count, dim)
            out[group.rows] = attended.transpose(1, 2).reshape(-1, heads, dim)
        return out

    def _mask(self, group: _Group, window: int | None, fold: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[batch, 1, fold * count, key_length]`; computed once per step and shared by the layers."""
        if window not in group.masks:
            batch, count = len(group.spans), group.spans[0].count
            queries = self.position_ids[group.rows].view(batch, 1, count, 1)
            keys = torch.arange(group.key_length, device=queries.device)
            group.masks[window] = fold_mask(visibility(queries, keys, window, dtype), fold)
        return group.masks[window]
