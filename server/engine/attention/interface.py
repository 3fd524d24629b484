"""Prelude's attention function, which is registered with transformers, and the interface of layouts.

All tokens of a step pass through the model as one flat row `[1, tokens]`. The model's own layers do not know where one
sequence ends and the next begins: they pass query, key and value to `attend_flat_row`, which calls the step's layout.
The layout is passed through the model's forward as the keyword `layout`.

Layers that keep a recurrent state instead of keys and values call the layout too: see `RecurrentLayout`.

    PackedRows    every row attends within itself, nothing is cached, gradients flow     (training)
    SharedStart   the same, after a start that is in the flat row once for all rows      (training)
    CachedRows    keys and values are stored in slots, which attention reads             (serving, see kv_cache.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from server.errors import UnsupportedModel

ATTENTION_NAME = "prelude"

# Keywords that models pass and this function can ignore: positions are already in the rotary embeddings, the layout
# handles causality, and only the output is needed.
_WITHOUT_EFFECT = {
    *("position_ids", "cache_position", "position_embeddings", "is_causal", "use_cache", "logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """A layer's requirements for attention beside causality."""

    scaling: float
    sliding_window: int | None = None
    """Each token sees itself and the `sliding_window - 1` tokens before it."""
    softcap: float | None = None
    """Scores are squashed to softcap * tanh(score / softcap), as Gemma 2 does."""
    sinks: torch.Tensor | None = field(default=None, compare=False)
    """`[heads]`: an extra score for each head, which takes part in the softmax but adds no value, as in gpt-oss."""


class Layout(Protocol):
    """How the tokens of one flat row belong to sequences."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        """Compute one layer's attention `[tokens, heads, dim]`.

        Args:
            layer: the layer's index.
            query: `[heads, tokens, dim]`.
            key: `[kv_heads, tokens, dim]`; value likewise.
            rules: the layer's requirements beside causality.
        """


class StateSlice(NamedTuple):
    """The position of a layer's recurrent state in a sequence's row of states."""

    first: int
    width: int


Recurrence = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""A function from inputs `[rows, tokens, width]` and the states before them `[rows, state width]`, which are 0 at the
start of a sequence, to outputs `[rows, tokens, …]` and the states after them. States are at least float32."""


class RecurrentLayout(Layout, Protocol):
    """A layout for models with layers that keep a recurrent state."""

    def recur(self, state_slice: StateSlice, inputs: torch.Tensor, recurrence: Recurrence) -> torch.Tensor:
        """Compute one layer's outputs `[tokens, …]` from its inputs `[tokens, width]`.

        The layer's computation, `recurrence`, is called for batches of sequences with equal numbers of tokens.
        """


def attend_flat_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query `[1, heads, tokens, dim]` to output `[1, tokens, heads, dim]`.

    Raises:
        UnsupportedModel: the layer needs something that this function does not support (position biases, …); ignoring
            it would silently give wrong results.
    """
    unknown = sorted(name for name, value_ in others.items() if value_ is not None and name not in _WITHOUT_EFFECT)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if dropout:
        unknown.append("dropout")
    if layout is None:
        raise UnsupportedModel(
            "The model does not hand its forward's keywords to the attention, so the engine's layout does not reach it."
        )
    if unknown:
        raise UnsupportedModel(f"The model's attention uses {', '.join(unknown)}, which the engine does not implement.")
    sinks = None if s_aux is None else s_aux.detach().reshape(query.shape[1])
    rules = AttentionRules(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, sinks)
    layer = int(getattr(module, "layer_idx", -1))
    return layout.attend(layer, query[0], key[0], value[0], rules).unsqueeze(0), None


def register_attention() -> None:
    """Register `attn_implementation="prelude"` with transformers, which then passes no attention mask."""
    AttentionInterface.register(ATTENTION_NAME, attend_flat_row)


def attend_batch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rules: AttentionRules
) -> torch.Tensor:
    """Attention `[batch, heads, q_len, dim]`; query heads that share a key head are folded into the query rows.

    Args:
        query: `[batch, heads, q_len, dim]`.
        key: `[batch, kv_heads, kv_len, dim]`, any strides; value likewise.
        mask: `[batch or 1, 1, group * q_len, kv_len]` from `fold_mask`, in the query's dtype.
        rules: scaling, soft-cap and sinks; the mask already contains the window.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads = key.shape[1]
    folded = query.reshape(batch, kv_heads, heads // kv_heads * q_len, dim)
    if rules.softcap is None and rules.sinks is None and not (query.requires_grad or key.requires_grad):
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=rules.scaling)
    else:
        # Explicit operations where SDPA lacks a feature (soft-cap, sinks), and in training, where they are twice as
        # fast on a CPU.
        scores = (folded @ key.transpose(-1, -2)) * rules.scaling
        if rules.softcap is not None:
            scores = torch.tanh(scores / rules.softcap) * rules.softcap
        scores = scores + mask
        weights = scores.softmax(dim=-1, dtype=_wide(query.dtype))
        if rules.sinks is not None:
            sinks = rules.sinks.view(kv_heads, heads // kv_heads).repeat_interleave(q_len, dim=1).to(weights.dtype)
            weights = weights * (scores.to(weights.dtype).logsumexp(-1) - sinks).sigmoid().unsqueeze(-1)
        out = weights.to(query.dtype) @ value
    return out.reshape(batch, heads, q_len, dim)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def visibility(
    query_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Additive mask: 0 where a query sees a key (not later, and within the window), else -inf.

    Shapes broadcast: `[…, q_len, 1]` against `[…, 1, kv_len]`.
    """
    visible = key_positions <= query_positions
    if window is not None:
        visible = visible & (key_positions > query_positions - window)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def fold_mask(mask: torch.Tensor, group: int) -> torch.Tensor:
    """Repeat a mask `[batch, 1, q_len, kv_len]` for the `group` query heads that are folded into the query rows."""
    return mask if mask.shape[2] == 1 else mask.repeat(1, 1, group, 1)


@dataclass
class PackedRows:
    """Layout for training: whole sequences one after another, each attending causally within itself, nothing cached.

    Only inside the attention, rows are padded to the longest row, because one batched product is faster than many small
    products. The rest of the model computes no padding tokens.
    """

    lengths: Sequence[int]
    """Tokens of each row, in the order of the flat row."""
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] | Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Keys and values `[kv_heads, prefix tokens, dim]` of each layer that precede every row."""
    collected: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    """If given, receives the keys and values `[kv_heads, tokens, dim]` of each layer."""
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
        lengths = torch.tensor(self.lengths)
        self._longest = int(lengths.max())
        offsets = torch.arange(self._longest)
        inside = offsets[None, :] < lengths[:, None]  # (rows, longest)
        self._pad_index = torch.where(inside, starts[:, None] + offsets, starts[:, None]).reshape(-1)
        self._flat_index = inside.reshape(-1).nonzero().squeeze(1)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        if self.collected is not None:
            self.collected[layer] = (key, value)
        if self._pad_index.device != query.device:  # once per step, because the host waits for such a copy
            self._pad_index, self._flat_index = self._pad_index.to(query.device), self._flat_index.to(query.device)
        keys, values = self._pad(key), self._pad(value)
        if self.prefix is not None:
            keys, values = (
                torch.cat([before.to(own).expand(len(self.lengths), -1, -1, -1), own], dim=2)
                for before, own in zip(self.prefix[layer], (keys, values), strict=True)
            )
        mask = self._mask(rules.sliding_window, query, query.shape[0] // key.shape[0])
        out = attend_batch(self._pad(query), keys, values, mask, rules)
        heads, dim = query.shape[0], query.shape[2]
        return out.transpose(1, 2).reshape(-1, heads, dim)[self._flat_index]

    def recur(
        self, state_slice: StateSlice, inputs: torch.Tensor, recurrence: Recurrence, state: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `RecurrentLayout.recur`; if given, `state` `[1, state width]` is the initial state of every row."""
        assert self.prefix is None or state is not None, "keys and values before the rows say nothing of their state"
        rows = len(self.lengths)
        padded = inputs.index_select(0, self._pad_index.to(inputs.device)).view(rows, self._longest, -1)
        # Padding follows a row's tokens, so it only changes states that are not read.
        before = no_states(state_slice, inputs, rows) if state is None else state.expand(rows, -1)
        out, _ = recurrence(padded, before)
        return out.flatten(0, 1)[self._flat_index.to(inputs.device)]

    def _pad(self, states: torch.Tensor) -> torch.Tensor:
        """`[heads, tokens, dim]` to `[rows, heads, longest, dim]`; padding repeats a row's first token."""
        heads, _, dim = states.shape
        padded = states.transpose(0, 1).index_select(0, self._pad_index)
        return padded.view(len(self.lengths), self._longest, heads, dim).transpose(1, 2)

    def _mask(self, window: int | None, query: torch.Tensor, fold: int) -> torch.Tensor:
        if window not in self._masks:
            before = 0 if self.prefix is None else self.prefix[0][0].shape[1]
            positions = torch.arange(before + self._longest, device=query.device)
            mask = visibility(positions[before:, None], positions[None, :], window, query.dtype)
            self._masks[window] = fold_mask(mask[None, None], fold)
        return self._masks[window]


class SharedStart:
    """Layout for training: a start that all rows share, once, then the rows. Each row attends to the start and itself.

    The start does not attend to later tokens, so its values are the same for every row, gradients included. With twenty
    virtual tokens before sixteen rows, this saves three hundred tokens.
    """

    def __init__(self, num_shared: int, lengths: Sequence[int]) -> None:
        """Lay out `num_shared` tokens followed by rows of these lengths."""
        self._num_shared = num_shared
        self._prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> keys and values of the start
        self._start = PackedRows([num_shared], collected=self._prefix)
        self._rows = PackedRows(lengths, self._prefix)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        size = self._num_shared
        start = self._start.attend(layer, query[:, :size], key[:, :size], value[:, :size], rules)
        rows = self._rows.attend(layer, query[:, size:], key[:, size:], value[:, size:], rules)
        return torch.cat([start, rows])

    def recur(self, state_slice: StateSlice, inputs: torch.Tensor, recurrence: Recurrence) -> torch.Tensor:
        size = self._num_shared
        start, state = recurrence(inputs[None, :size], no_states(state_slice, inputs, 1))
        return torch.cat([start[0], self._rows.recur(state_slice, inputs[size:], recurrence, state)])


def no_states(state_slice: StateSlice, inputs: torch.Tensor, rows: int) -> torch.Tensor:
    """Initial states of sequences: zeros `[rows, state width]`."""
    return inputs.new_zeros(rows, state_slice.width, dtype=_wide(inputs.dtype))
