"""The layout of a serving step on a CPU, with attention in compiled loops (`kernels/attention.py`).

This module divides a step into units of work and passes the loops the addresses of their data. Each unit belongs to one
sequence and depends only on its slot and length, so no other sequence can change a bit of its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from server.engine.attention.cached_rows import Span, TokenPositions
from server.engine.attention.interface import AttentionRules
from server.engine.kernels.units import BLOCK, EVERYTHING, QUERIES, AttentionArguments, SpanColumns, float_bits
from server.engine.memory.kv_cache import KVCache

if TYPE_CHECKING:  # numba is imported only if it is used
    from server.engine.kernels.library import Kernels

POSITIONS_FOR_THREADS = 512
"""With fewer positions, one thread finishes before a second one has started."""

FEWEST_NUMBERS = 4
"""Torch handles heads whose size is not a multiple of this: their vectors would be too short to pay off."""


@dataclass(frozen=True)
class StepWork:
    """The units of work of a step, which are the same in every layer."""

    spans: np.ndarray  # [spans, 7], see `SpanColumns`
    spread: np.ndarray  # [units, 3]: span, key head, block of positions
    attend: np.ndarray  # [units, 3]: span, key head, block of queries; -1 means all key heads, or a single token
    tokens: int  # of the flat row, without padding
    rows: int  # of the flat row
    blocks: int  # number of scratch blocks for each key head
    threads: int  # number of threads to use


class CompiledAttention:
    """The compiled attention loops for one KV cache. Not thread-safe."""

    def __init__(self, kv_cache: KVCache, kernels: Kernels) -> None:
        """Call `over` instead, which checks that the loops support the model."""
        states = kv_cache.states
        _, _, _, self._kv_heads, self._dim = states.shape
        self._kernels = kernels
        self._states = states  # keeps the memory behind the addresses alive
        self._layers = [(layer[0].data_ptr(), layer[1].data_ptr()) for layer in states]
        self._scratch = _floats(0)
        self._sinks: dict[int, torch.Tensor] = {}  # layer -> sinks in float32

    @classmethod
    def over(
        cls, kv_cache: KVCache, rules: Sequence[AttentionRules], kernels: Kernels | None
    ) -> CompiledAttention | None:
        """The loops for a cache; None without compiled code, or if a layer needs a feature that the loops lack."""
        odd = kv_cache.states.shape[-1] % FEWEST_NUMBERS
        return None if kernels is None or odd or any(rule.softcap for rule in rules) else cls(kv_cache, kernels)

    def plan(self, spans: Sequence[Span], padding: int = 0) -> StepWork:
        """Divide a step into units of work, largest first, so that all threads finish at about the same time."""
        rows, blocks, first_row = [], 0, 0
        chunks, decoding = [], []
        owners: dict[int, Span] = {}  # number of a prefix -> the sequence from whose slot all read it
        for index, span in enumerate(spans):
            # Decoding sequences of one prefix all read it from the same slot, which then is in the processor's cache.
            sharing = span.count == 1 and span.prefix and span.start >= span.prefix_length
            owner = owners.setdefault(span.prefix, span) if sharing else span
            shared = 0 if owner is span else span.prefix_length
            rows.append((first_row, span.start, span.count, span.slot.start, blocks, owner.slot.start, shared))
            first_row += span.count
            if span.count == 1:
                decoding.append(index)
            else:
                chunks.append((index, span))
                blocks += -(-span.end // BLOCK)
        heads = range(self._kv_heads)
        spread = [(i, h, b) for i, span in chunks for b in range(-(-span.end // BLOCK)) for h in heads]
        # The last block of queries comes first, because it sees the most positions.
        attend = [(i, h, q) for i, span in chunks for q in reversed(range(-(-span.count // QUERIES))) for h in heads]
        positions = sum(span.end for span in spans)
        threads = torch.get_num_threads() if positions > POSITIONS_FOR_THREADS or chunks else 1
        # Reading a sequence as one unit is fastest, but with fewer sequences than threads, some threads would be idle.
        attend += [(i, h, -1) for i in decoding for h in ((-1,) if len(spans) > threads else heads)]
        return StepWork(
            _table(rows, len(SpanColumns._fields)),
            _table(spread, 3),
            _table(attend, 3),
            first_row,
            first_row + padding,
            blocks,
            threads,
        )

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        work: StepWork,
        rules: AttentionRules,
    ) -> torch.Tensor:
        """Store a step's keys and values, and attend; see `interface.Layout.attend` for the shapes."""
        heads, tokens, dim = query.shape
        # The loops receive addresses and cannot check dtypes or shapes.
        assert {states.dtype for states in (query, key, value)} == {self._states.dtype}, "stored as the cache is"
        assert key.shape == value.shape == (self._kv_heads, tokens, self._dim), "shaped as the cache is"
        assert dim == self._dim, "queries too"
        assert tokens == work.rows, "as many as were laid out"
        out = query.new_empty(tokens, heads, dim)
        out[work.tokens :] = 0
        query, key, value = (states if states.stride(2) == 1 else states.contiguous() for states in (query, key, value))
        constant = self.arguments(layer, rules, query, key, value, out)
        arguments = constant._replace(units=work.attend.ctypes.data, **self.addresses(work))
        loops = self._kernels.attention(heads // self._kv_heads, self._kv_heads, dim, self._states.dtype)
        if len(work.spread):
            spread = arguments._replace(units=work.spread.ctypes.data)
            loops.spread(len(work.spread), work.threads, *spread)
        loops.attend(len(work.attend), work.threads, *arguments)
        return out

    def arguments(
        self,
        layer: int,
        rules: AttentionRules,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
    ) -> AttentionArguments:
        """The arguments of both loops for a layer; those of a step's work are 0, see `addresses`."""
        keys, values = self._layers[layer]
        return AttentionArguments(
            units=0,
            spans=0,
            query=query.data_ptr(),
            query_step=query.stride(1),
            query_head_step=query.stride(0),
            key=key.data_ptr(),
            key_step=key.stride(1),
            key_head_step=key.stride(0),
            value=value.data_ptr(),
            value_step=value.stride(1),
            value_head_step=value.stride(0),
            keys=keys,
            values=values,
            scratch_keys=0,
            scratch_values=0,
            scaling=float_bits(rules.scaling),
            window=EVERYTHING if rules.sliding_window is None else rules.sliding_window,
            out=out.data_ptr(),
            sinks=self._sinks_of(layer, rules),
            threads=torch.get_num_threads(),
        )

    def addresses(self, work: StepWork) -> dict[str, int]:
        """The arguments that a step's work determines, except for the units."""
        turned, plain = self._scratch_for(work.blocks)
        return {"spans": work.spans.ctypes.data, "scratch_keys": turned, "scratch_values": plain}

    def _sinks_of(self, layer: int, rules: AttentionRules) -> int:
        """The address of a layer's sinks; 0 if it has none."""
        if rules.sinks is None:
            return 0
        if layer not in self._sinks:  # cached, because the weights are frozen
            self._sinks[layer] = rules.sinks.float().contiguous()
        return self._sinks[layer].data_ptr()

    def _scratch_for(self, blocks: int) -> tuple[int, int]:
        """Addresses of reused scratch memory for this many blocks of keys and values."""
        size = blocks * self._kv_heads * BLOCK * self._dim
        if 2 * size > len(self._scratch):
            self._scratch = _floats(2 * size)
        address = self._scratch.data_ptr()
        return address, address + size * self._scratch.element_size()


class CompiledRows:
    """Serving layout over compiled attention; see `interface.Layout`."""

    def __init__(self, attention: CompiledAttention, spans: Sequence[Span], padding: int = 0) -> None:
        """Lay out a step, whose spans are in the order of the flat row.

        Rows of `padding` follow them. They attend to nothing, and nothing is stored of them.
        """
        self.attention = attention
        self.work = attention.plan(spans, padding)
        position_ids = TokenPositions.of(spans).position_ids
        self.position_ids = torch.from_numpy(np.concatenate((position_ids, np.zeros(padding, dtype=np.int64))))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        return self.attention.attend(layer, query, key, value, self.work, rules)


def _floats(count: int) -> torch.Tensor:
    """Memory for compiled loops, independent of torch's default dtype and device."""
    return torch.empty(count, dtype=torch.float32, device="cpu")


def _table(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, width)
