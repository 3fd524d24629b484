"""All decoder layers of a step as one call of compiled code (`kernels/chain.py`).

Layer by layer, a step calls some hundreds of operators, and with few rows, Python and waking threads take longer than
the work. This module lists the loops of all layers with their arguments in a table, and one call runs them. A step
writes to the table only what differs from step to step: the number of rows, and where attention reads.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from server.engine.attention.compiled_rows import CompiledAttention, CompiledRows
from server.engine.attention.interface import Layout
from server.engine.fast.fused import FusedLayer, Norm
from server.engine.fast.row_buckets import bucket
from server.engine.fast.tiled import TiledLinear
from server.engine.kernels.units import (
    CHUNK,
    COLUMNS,
    ROWS,
    SHARES,
    TILE_ROWS,
    AttentionArguments,
    LinkColumns,
    ProductArguments,
    float_bits,
)

if TYPE_CHECKING:  # numba is imported only if it is used
    from server.engine.kernels.attention import AttentionLoops
    from server.engine.kernels.library import Kernels
    from server.engine.kernels.threads import Loop

UNITS, FIRST = 1, 2
"""Index of the number of units among a loop's arguments, and of the first argument after it."""
_ATTENTION = AttentionArguments(*range(FIRST, FIRST + len(AttentionArguments._fields)))
_PRODUCT = ProductArguments(*range(FIRST, FIRST + len(ProductArguments._fields)))
COUNTERS = slice(FIRST + len(_PRODUCT), FIRST + len(_PRODUCT) + SHARES)
"""Of the shares of a product."""
WIDTH = max(FIRST + len(_ATTENTION), COUNTERS.stop)
"""Of the table."""
_IN_TILES = ("normed", "inner")
"""Memory of rows that lie in tiles."""


class _Link(NamedTuple):
    """A loop of the chain with its arguments after the number of units; what differs from step to step is 0."""

    kind: str
    loop: Loop
    arguments: tuple[int, ...]


class ChainedLayers(nn.Module):
    """All layers of a model, a drop-in replacement for them in transformers' loop over layers."""

    def __init__(self, layers: Sequence[FusedLayer], kernels: Kernels) -> None:
        """Take the layers, for which `can_chain` is true."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._kernels = kernels
        self._chain = kernels.chain()
        self._yield = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
        self._table: _Table | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        kept: torch.Tensor | None = None,
        **others: object,
    ) -> torch.Tensor:
        """What the layers compute one after another; see `FusedLayer.forward`."""
        if not isinstance(layout, CompiledRows):
            for layer in self.layers:
                hidden_states = layer(
                    hidden_states, position_embeddings=position_embeddings, layout=layout, kept=kept, **others
                )
            return hidden_states
        rows = hidden_states.shape[1]
        if self._table is None or not self._table.serves(layout.attention, rows):
            self._table = _Table([*self.layers], self._kernels, layout.attention, rows)
        if kept is None:
            kept = torch.arange(rows)
        self._table.prepare(hidden_states[0], position_embeddings, layout, kept)
        threads, links = torch.get_num_threads(), self._table.links
        self._chain(threads, threads, len(links), links.ctypes.data, self._yield)
        return self._table.result(len(kept)).unsqueeze(0)


def can_chain(layers: Iterable[nn.Module]) -> bool:
    """Whether layers can be run by `ChainedLayers`: all have the same sizes, so one memory serves them all."""
    sizes = set()
    for layer in layers:
        if not isinstance(layer, FusedLayer) or not layer.is_silu or layer.head_norms:
            return False
        products = [part for part in layer.products() if isinstance(part, TiledLinear)]
        if len(products) < len(layer.products()):
            return False
        sizes.add((layer.heads, layer.kv_heads, *((part.in_features, part.out_features) for part in products)))
    return len(sizes) == 1


class _Table:
    """The links of a chain, for one KV cache and at most a number of rows, and the memory that they work in."""

    def __init__(self, layers: Sequence[FusedLayer], kernels: Kernels, attention: CompiledAttention, rows: int) -> None:
        self._attention = weakref.ref(attention)
        self._rows = rows = bucket(rows)
        first = layers[0]
        hidden, attended = first.output_projection.out_features, first.heads * first.head_dim
        widths = {"x": hidden, "normed": hidden, "qkv": first.qkv.out_features, "attended": attended}
        widths |= {"inner": first.down.in_features, "kept_x": hidden, "kept_attended": attended}
        whole_tiles = -(-rows // TILE_ROWS) * TILE_ROWS
        self._memory = {name: torch.empty(whole_tiles, width, dtype=torch.bfloat16) for name, width in widths.items()}
        self._at = {name: tensor.data_ptr() for name, tensor in self._memory.items()}
        self._small = kernels.small(torch.bfloat16)
        loops = kernels.attention(first.heads // first.kv_heads, first.kv_heads, first.head_dim, torch.bfloat16)
        links = []
        for layer in layers[:-1]:
            links += [*self._attend(layer, attention, loops), *self._transform(layer, "x", "attended")]
        links += self._attend(layers[-1], attention, loops)
        num_early = len(links)  # the links after these have only the rows that are kept
        links += [self._gather("x", hidden), self._gather("attended", attended)]
        links += self._transform(layers[-1], "kept_x", "kept_attended")
        self._fill(links, num_early)

    def _fill(self, links: Sequence[_Link], num_early: int) -> None:
        self.links = np.zeros((len(links), len(LinkColumns._fields)), dtype=np.int64)
        self._numbers = np.zeros((len(links), WIDTH), dtype=np.int64)
        for row, link in enumerate(links):
            self._numbers[row, FIRST : FIRST + len(link.arguments)] = link.arguments
            self.links[row, :2] = link.loop.address, self._numbers[row].ctypes.data
        kinds, early = np.array([link.kind for link in links]), np.arange(len(links)) < num_early
        self._rows_of = {kind: np.flatnonzero(kinds == kind) for kind in set(kinds)}
        self._by_rows = [
            (np.flatnonzero(early), np.flatnonzero(early & (kinds == "product"))),
            (np.flatnonzero(~early), np.flatnonzero(~early & (kinds == "product"))),
        ]

    def serves(self, attention: CompiledAttention, rows: int) -> bool:
        """Whether a step can use this table."""
        return self._attention() is attention and rows <= self._rows

    def prepare(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], layout: CompiledRows, kept: torch.Tensor
    ) -> None:
        """Write a step's input and what differs from step to step; the tensors must outlive the step."""
        self._memory["x"][: len(x)] = x
        numbers, of = self._numbers, self._rows_of
        numbers[:, 0] = 0
        self.links[:, 2:] = 0
        # Residuals are added in place, so the last tile of rows must not overlap the one before.
        all_rows = bucket(len(x)), bucket(len(kept)) if len(kept) else 0
        assert max(all_rows) <= self._rows, "no more than there is memory for"
        for (links, products), rows in zip(self._by_rows, all_rows, strict=True):
            numbers[links, UNITS] = -(-rows // ROWS)
            numbers[links, FIRST] = rows
            numbers[products, UNITS] = numbers[products, _PRODUCT.columns] // COLUMNS * -(-rows // CHUNK)
        numbers[of["product"], _PRODUCT.shares] = min(torch.get_num_threads(), SHARES)
        numbers[of["product"], COUNTERS] = 0
        cos, sin = rotation
        numbers[of["rotate"], FIRST] = len(x)  # as many as `cos` and `sin` have
        numbers[of["rotate"], FIRST + 2 : FIRST + 4] = cos.data_ptr(), sin.data_ptr()
        numbers[of["gather"], UNITS], numbers[of["gather"], FIRST] = -(-len(kept) // ROWS), len(kept)
        numbers[of["gather"], FIRST + 1] = kept.data_ptr()
        step = layout.attention.addresses(layout.work)
        for kind, units in (("spread", layout.work.spread), ("attend", layout.work.attend)):
            numbers[of[kind], UNITS] = len(units)
            numbers[of[kind], _ATTENTION.units] = units.ctypes.data
            numbers[of[kind], _ATTENTION.spans] = step["spans"]
            numbers[of[kind], _ATTENTION.scratch_keys] = step["scratch_keys"]
            numbers[of[kind], _ATTENTION.scratch_values] = step["scratch_values"]

    def result(self, rows: int) -> torch.Tensor:
        """The rows that were kept, in memory that the next step overwrites."""
        return self._memory["kept_x"][:rows]

    def _attend(self, layer: FusedLayer, attention: CompiledAttention, loops: AttentionLoops) -> list[_Link]:
        qkv = self._memory["qkv"].view(len(self._memory["qkv"]), -1, layer.head_dim).transpose(0, 1)
        query, key, value = torch.split(qkv, [layer.heads, layer.kv_heads, layer.kv_heads])
        arguments = attention.arguments(layer.index, layer.rules, query, key, value, self._memory["attended"])
        all_heads, turned = layer.heads + 2 * layer.kv_heads, layer.heads + layer.kv_heads
        return [
            self._norm(layer.attention_norm, "x"),
            self._product(layer.qkv, "normed", "qkv"),
            _Link("rotate", self._small.rotate, (0, self._at["qkv"], 0, 0, all_heads, turned, layer.head_dim)),
            _Link("spread", loops.spread, arguments),
            _Link("attend", loops.attend, arguments),
        ]

    def _transform(self, layer: FusedLayer, x: str, attended: str) -> list[_Link]:
        return [
            self._product(layer.output_projection, attended, x, adds=True),
            self._norm(layer.mlp_norm, x),
            self._product(layer.gate_up, "normed", "inner"),
            self._product(layer.down, "inner", x, adds=True),
        ]

    def _norm(self, norm: Norm, x: str) -> _Link:
        width, addresses = len(norm.weight), (self._at[x], norm.weight.data_ptr(), self._at["normed"])
        in_tiles = "normed" in _IN_TILES
        return _Link("norm", self._small.rms_norm, (0, *addresses, width, float_bits(norm.epsilon), in_tiles))

    def _product(self, linear: nn.Module, x: str, out: str, *, adds: bool = False) -> _Link:
        assert isinstance(linear, TiledLinear), "see can_chain"
        residual = self._memory[out] if adds else None
        tiles = {"x_in_tiles": x in _IN_TILES, "out_in_tiles": out in _IN_TILES}
        arguments = linear.arguments(0, self._at[x], residual, self._at[out], **tiles)
        return _Link("product", linear.loop(adds=adds), arguments)

    def _gather(self, name: str, width: int) -> _Link:
        return _Link("gather", self._small.gather, (0, 0, self._at[name], self._at[f"kept_{name}"], width))
