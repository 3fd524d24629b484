"""The layout of a serving step: where each token's keys and values go, and what each token attends to.

Tokens that are alone in their step (decoding) read the slots of neighbours as one batch; chunks of a prefill are
attended one by one. All of them read the pool as it lies, nothing is gathered. This is torch's way, for any device and
dtype; where they can be used, `varlen_rows.py` and `compiled_rows.py` are faster.
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
    """One sequence's share of a step: `count` tokens from position `start` on; nobody changes it.

    Python makes frozen ones three times as slowly, and a step makes one for each sequence.
    """

    slot: Slot
    start: int
    count: int

    @property
    def end(self) -> int:
        """Positions of the sequence that are filled once the step has run."""
        return self.start + self.count


@dataclass(frozen=True)
class TokenPositions:
    """Where a step's tokens are, worked out on the host: `[tokens]` each."""

    position_ids: np.ndarray
    """Each token's position in its own sequence."""
    pool_positions: np.ndarray
    """Where its keys and values go."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> TokenPositions:
        """Of the tokens of a flat row."""
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
        """True if the span continues this run: one token, in the slot right behind the last one."""
        last = self.spans[-1]
        neighbour = span.slot.length == last.slot.length and span.slot.start == last.slot.start + last.slot.length
        return neighbour and span.count == last.count == 1


class CachedRows:
    """Serving layout over a KV cache; see `attention.Layout`."""

    def __init__(self, kv_cache: KVCache, spans: Sequence[Span]) -> None:
        """Lay out a step.

        Args:
            kv_cache: where keys and values go.
            spans: in the order of the flat row, decoding ones first and sorted by slot to form runs.
        """
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
        """See `attention.Layout.attend`."""
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
        """Additive mask `[batch, 1, fold * count, key_length]`; made once per step, shared by the layers."""
        if window not in group.masks:
            batch, count = len(group.spans), group.spans[0].count
            queries = self.position_ids[group.rows].view(batch, 1, count, 1)
            keys = torch.arange(group.key_length, device=queries.device)
            group.masks[window] = fold_mask(visibility(queries, keys, window, dtype), fold)
        return group.masks[window]
