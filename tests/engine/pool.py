"""Steps over a pool of keys and values in which all that belongs to nobody is poison, and stays as it is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from server.contracts import ModelSpec
from server.engine.attention.cached_rows import Span, TokenPositions
from server.engine.attention.compiled_rows import CompiledAttention, CompiledRows
from server.engine.attention.interface import AttentionRules
from server.engine.kernels.library import Kernels
from server.engine.kernels.units import BLOCK
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.slots import Slot

NAN, INF = float("nan"), float("inf")
LAYERS, LAYER = 2, 1
AROUND = 7
"""Positions before and behind the pool, which are not the pool's."""


class Heads(NamedTuple):
    group: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    @property
    def queries(self) -> int:
        return self.group * self.kv_heads


@dataclass
class Row:
    """A sequence's share of a step: what is new, and behind it all keys and values, the new ones among them.

    Attributes:
        start: positions that are filled before.
        query: `[count, heads, dim]`.
        keys: `[start + count, kv_heads, dim]`; values likewise.
    """

    start: int
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def random(cls, heads: Heads, start: int, count: int, seed: int = 0) -> Row:
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(count, heads.queries, heads.dim, generator=generator)
        keys, values = torch.randn(2, start + count, heads.kv_heads, heads.dim, generator=generator)
        return cls(start, query.to(heads.dtype), keys.to(heads.dtype), values.to(heads.dtype))

    @property
    def count(self) -> int:
        return len(self.query)

    @property
    def end(self) -> int:
        return self.start + self.count

    def part(self, start: int, end: int) -> Row:
        """The same sequence when tokens from `start` to `end` come in a step; both are positions."""
        first = start - self.start
        return Row(start, self.query[first : end - self.start], self.keys[:end], self.values[:end])

    def attention(self, rules: AttentionRules) -> torch.Tensor:
        """Written out in float64: `[count, heads, dim]`."""
        group = self.query.shape[1] // self.keys.shape[1]
        keys, values = (states.double().repeat_interleave(group, dim=1) for states in (self.keys, self.values))
        scores = torch.einsum("thd,phd->htp", self.query.double(), keys) * rules.scaling
        tokens, positions = torch.arange(self.start, self.end)[:, None], torch.arange(self.end)
        hidden = positions > tokens
        if rules.sliding_window is not None:
            hidden |= positions <= tokens - rules.sliding_window
        scores = scores.masked_fill(hidden, -INF)
        if rules.sinks is not None:  # a score that has no value
            scores = torch.cat([scores, rules.sinks.double()[:, None, None].expand(-1, len(tokens), 1)], dim=-1)
        return torch.einsum("htp,phd->thd", scores.softmax(-1)[..., : self.end], values)


def bits(states: torch.Tensor) -> torch.Tensor:
    """NaN is equal to itself."""
    return states.view(torch.int16 if states.dtype == torch.bfloat16 else torch.int32)


def same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(got, expected, strict=True))


def assert_attention(got: torch.Tensor, row: Row, rules: AttentionRules) -> None:
    """Attention of a row, but for rounding."""
    rtol = 2e-5 if got.dtype == torch.float32 else 1.01 * 2.0**-8
    torch.testing.assert_close(got.double(), row.attention(rules), rtol=rtol, atol=1e-5)


def poison(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN and infinity by turns."""
    states = torch.full(shape, NAN, dtype=dtype)
    states.view(-1)[::3] = INF
    return states


class Pool:
    """A pool that holds nothing but some rows, in an order and with holes that a seed decides.

    Attributes:
        memory: `[layers, 2, AROUND + positions + AROUND, kv_heads, dim]`: more than the pool.
        spans: of the rows; the last slot ends where the pool ends.
    """

    def __init__(self, rows: Sequence[Row], heads: Heads, seed: int = 0) -> None:
        dice = random.Random(seed)
        starts, position = {}, dice.randrange(4)
        for index in dice.sample(range(len(rows)), len(rows)):
            starts[index] = position
            position += rows[index].end
            size, position = position, position + dice.randrange(4)
        self.memory = poison(LAYERS, 2, AROUND + size + AROUND, heads.kv_heads, heads.dim, dtype=heads.dtype)
        name = str(heads.dtype).removeprefix("torch.")
        spec = ModelSpec("m", "", heads.queries * heads.dim, LAYERS, heads.kv_heads, heads.dim, 99, 1, name, "cpu")
        self.kv_cache = KVCache(spec, num_slabs=1)
        self.kv_cache.states = self.memory[:, :, AROUND : AROUND + size]
        self.spans = []
        for index, row in enumerate(rows):
            start = starts[index]
            self.spans.append(Span(Slot(row.end, start), row.start, row.count))
            self.kv_cache.states[LAYER, 0, start : start + row.start] = row.keys[: row.start]
            self.kv_cache.states[LAYER, 1, start : start + row.start] = row.values[: row.start]


def hand_over(rows: Sequence[Row], heads: Heads, how: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of a step `[heads, tokens, dim]`, in memory as layers have them; poison lies around them."""
    query = torch.cat([row.query for row in rows])
    key, value = (
        torch.cat([row.keys[row.start :] for row in rows]),
        torch.cat([row.values[row.start :] for row in rows]),
    )
    tokens, kv_heads = len(query), heads.kv_heads
    if how == "fused":  # one product of all
        joined = poison(tokens + 2, heads.queries + 2 * kv_heads, heads.dim, dtype=heads.dtype)
        joined[1:-1] = torch.cat((query, key, value), dim=1)
        query, key, value = joined[1:-1].transpose(0, 1).split_with_sizes([heads.queries, kv_heads, kv_heads])
        return query, key, value
    if how == "plain":  # as transformers' layers: what was rotated has been copied, values are seen from the side
        around = poison(kv_heads + 2, tokens, heads.dim, dtype=heads.dtype)
        around[1:-1] = key.transpose(0, 1)
        return query.transpose(0, 1).contiguous(), around[1:-1], value.transpose(0, 1)
    assert how == "turned"  # numbers of a head lie apart
    turned = [states.permute(1, 2, 0).contiguous().transpose(1, 2) for states in (query, key, value)]
    return turned[0], turned[1], turned[2]


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Torch computes on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attend(
    kernels: Kernels,
    heads: Heads,
    rows: Sequence[Row],
    rules: AttentionRules,
    *,
    how: str = "fused",
    seed: int = 0,
    threads: int = 2,
) -> list[torch.Tensor]:
    """A step of these rows in a pool of their own; answers `[count, heads, dim]` of each.

    Holds that the step's keys and values, and nothing else, are in the pool afterwards, as `KVCache.write` puts them;
    and that nothing is written to beside the scratch and the answer.
    """
    pool = Pool(rows, heads, seed)
    attention = CompiledAttention.over(pool.kv_cache, [rules], kernels)
    assert attention is not None
    size = 2 * BLOCK * heads.kv_heads * heads.dim * sum(-(-row.end // BLOCK) for row in rows if row.count > 1)
    scratch = poison(size + 200, dtype=torch.float32)  # of an earlier step
    attention._scratch = scratch[100 : 100 + size]
    query, key, value = hand_over(rows, heads, how)
    inputs = [states.clone() for states in (query, key, value)]
    expected = pool.memory.clone()
    positions = torch.from_numpy(TokenPositions.of(pool.spans).pool_positions)
    expected[LAYER, 0, AROUND:-AROUND].index_copy_(0, positions, key.transpose(0, 1))
    expected[LAYER, 1, AROUND:-AROUND].index_copy_(0, positions, value.transpose(0, 1))
    with on_threads(threads):
        out = CompiledRows(attention, pool.spans).attend(LAYER, query, key, value, rules)
    assert out.shape == (sum(row.count for row in rows), heads.queries, heads.dim)
    assert out.dtype == heads.dtype
    assert torch.equal(bits(pool.memory), bits(expected)), "something else was written to the pool"
    assert same([query.contiguous(), key.contiguous(), value.contiguous()], [states.contiguous() for states in inputs])
    untouched = poison(len(scratch), dtype=torch.float32)
    untouched[100 : 100 + size] = scratch[100 : 100 + size]
    assert same([scratch], [untouched]), "something was written beside the scratch"
    return list(out.split_with_sizes([row.count for row in rows]))
