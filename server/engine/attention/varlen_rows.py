"""The serving layout for CUDA: one or two calls of torch's flash attention per layer attend for all tokens of a step.

Decoding sequences and prefill chunks read their slots in the pool in place. This relies on the following properties of
torch's flash attention (flash_api.cpp `mha_varlen_fwd`, block_info.h, mask.h):

- If `seqused_k` is given, `cu_seq_k[i]` is only the start of sequence i, and `cu_seq_k[i + 1]` is not its end: `sum_s_k
  = cu_seqlens_k[i]`, `actual_seqlen_k = seqused_k[i]`. Slots may therefore be in any order, and data after
  `seqused_k[i]` is ignored.
- Causality and windows are aligned to the end: query r of n sees keys up to `r + seqused_k - n`; with
  `window_size=(left, 0)`, it sees only that key and the `left` keys before it.
- `max_q` and `max_k` are upper bounds; they only determine the size of the grid and how a long sequence is split.
- With `max_q == 1` and no window at all, the query heads that share a key head become rows of one product, and long
  sequences are split over the device; with `(-1, 0)` neither happens. A single query at its sequence's end needs no
  mask, so decodes request none; a sliding window is implemented by moving the start of the keys.

On machines with a GPU, tests/engine/attention/test_varlen_rows.py checks these properties.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from server.contracts import ModelSpec
from server.engine.attention.cached_rows import Span, TokenPositions
from server.engine.attention.interface import AttentionRules
from server.engine.memory.kv_cache import KVCache
from server.engine.to_device import upload

log = logging.getLogger(__name__)

VarlenAttention = Callable[..., torch.Tensor]
"""`flash_attention`, or a function that computes the same."""

LARGEST_HEAD = 256
"""Maximum head size of flash attention; it must also be a multiple of 8."""

OPERATOR = "_flash_attention_forward"

ON_NVIDIA = "NVIDIA's GPUs since Ampere (2020) have what it needs"

NEEDED = {"scale", "window_size_left", "window_size_right", "seqused_k"}
"""Arguments that the operator must have. Checked in its schema, because torch versions differ and some are patched."""


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    seqused_k: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of any number of sequences, by the operator that `torch.nn.attention.varlen.varlen_attn` wraps.

    The operator has supported `seqused_k` longer than its wrapper, and the wrapper doubles the time on the host.

    Args:
        query: `[tokens, heads, dim]`.
        key: `[positions, kv_heads, dim]`; value likewise.
        cu_seq_q: `[sequences + 1]` int32, the start of each sequence's tokens, and the end.
        cu_seq_k: `[sequences + 1]` int32, the start of each sequence's keys.
        max_q: upper bound on a sequence's tokens.
        max_k: upper bound on a sequence's keys.
        scale: factor of the scores.
        window_size: number of keys before and after its own that a token sees; -1 is unlimited.
        seqused_k: `[sequences]` int32, number of keys of each sequence.
        sinks: `[heads]`, see `AttentionRules`.

    Returns:
        `[tokens, heads, dim]`.
    """
    answered = getattr(torch.ops.aten, OPERATOR)(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        0.0,
        window_size == (-1, 0),
        False,
        scale=scale,
        window_size_left=window_size[0],
        window_size_right=window_size[1],
        seqused_k=seqused_k,
    )
    out: torch.Tensor = answered[0]
    if sinks is None:
        return out
    # The operator also returns the log of each softmax's denominator, [heads, tokens] in float32. A sink adds only to
    # the denominator, which scales the output by 1 / (1 + exp(sink - lse)).
    assert answered[1].shape == (query.shape[1], query.shape[0]), "as every torch gives it whose operator can serve"
    gate = (answered[1].transpose(0, 1) - sinks.float()).sigmoid()
    gated: torch.Tensor = out * gate.unsqueeze(-1)
    return gated.to(out.dtype)


def varlen_attention(model: ModelSpec, rules: Sequence[AttentionRules]) -> VarlenAttention | None:
    """The attention function for a model on CUDA; None if the model needs `CachedRows`."""
    return flash_attention if model.device.startswith("cuda") and _why_not(model, rules) is None else None


def log_attention(model: ModelSpec, rules: Sequence[AttentionRules]) -> None:
    """Log which attention serves a model on CUDA; for the slow one, also the reason and a remedy."""
    if not model.device.startswith("cuda"):
        return
    reason = _why_not(model, rules)
    if reason is None:
        log.info("attention: flash attention, two calls at most for each layer of a step")
    else:
        log.warning(
            "attention: one call for each run of neighbouring slots and no CUDA graphs, several times slower than "
            "flash attention, because %s",
            reason,
        )


def _why_not(model: ModelSpec, rules: Sequence[AttentionRules]) -> str | None:
    """The reason why flash attention cannot serve a model, and a remedy; None if it can."""
    other_model = "choose a model without it where speed counts, or lower PRELUDE_MAX_SEQUENCES to keep steps short"
    missing = NEEDED - operator_arguments()
    if torch.version.hip is not None:
        return f"flash attention for ROCm takes the lengths of sequences from elsewhere; {ON_NVIDIA}"
    capability = torch.cuda.get_device_capability(torch.device(model.device))
    if capability < (8, 0):
        version = ".".join(map(str, capability))
        return f"flash attention needs compute capability 8.0, and this device has {version}; {ON_NVIDIA}"
    if model.dtype != "bfloat16":
        return f"flash attention takes no {model.dtype}; PRELUDE_DTYPE=bfloat16 does"
    if model.head_dim % 8 or model.head_dim > LARGEST_HEAD:
        return f"flash attention takes no heads of {model.head_dim} numbers; {other_model}"
    if any(rule.softcap for rule in rules):
        return f"flash attention has no soft-cap, and the model asks for one; {other_model}"
    if missing:
        return f"flash attention of torch {torch.__version__} has no {', '.join(sorted(missing))}; torch 2.13 has"
    return None


def operator_arguments() -> set[str]:
    """Names of the arguments of torch's flash attention; empty if torch has no such operator."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{OPERATOR}")  # noqa: SLF001 - torch has no other way to ask
    # The operator also has an overload for quantised numbers, which is not used.
    return {argument.name for schema in schemas if not schema.overload_name for argument in schema.arguments}


class Part:
    """The sequences of a step that one attention call handles."""

    def __init__(
        self, starts: torch.Tensor, ends: torch.Tensor, first_rows: torch.Tensor, *, max_q: int, max_k: int
    ) -> None:
        """Take indices that are already on the device.

        Args:
            starts: `[sequences + 1]` int32, the start of each slot in the pool; the last number is not read.
            ends: `[sequences]` int32, number of positions of each sequence that are filled after the step.
            first_rows: `[sequences + 1]` int32, the start of each sequence's tokens in the part's rows, and the end.
            max_q: upper bound on a sequence's tokens in this step.
            max_k: upper bound on a sequence's filled positions.
        """
        self._first_rows, self._max_q, self._max_k = first_rows, max_q, max_k
        self._whole = (starts, ends)
        self._windows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        attention: VarlenAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rules: AttentionRules,
    ) -> torch.Tensor:
        """Attention `[tokens, heads, dim]` of this part's rows `[tokens, heads, dim]` over the pool."""
        starts, ends = self._whole
        window = (-1, 0) if rules.sliding_window is None else (rules.sliding_window - 1, 0)
        if self._max_q == 1:
            window = (-1, -1)
            if rules.sliding_window is not None:
                starts, ends = self._window(rules.sliding_window)
        return attention(
            query,
            keys,
            values,
            self._first_rows,
            starts,
            self._max_q,
            self._max_k,
            scale=rules.scaling,
            window_size=window,
            seqused_k=ends,
            sinks=rules.sinks,
        )

    def _window(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts and lengths of each sequence's last `length` positions; computed once per step for all layers."""
        if length not in self._windows:
            starts, ends = self._whole
            hidden = (ends - length).clamp_(min=0)
            shifted = starts.clone()
            shifted[:-1] += hidden
            self._windows[length] = (shifted, ends - hidden)
        return self._windows[length]


class VarlenRows:
    """Serving layout over a KV cache; see `interface.Layout`.

    Decodes and prefills use separate calls. One call for both would launch as many blocks for each decode as for the
    longest chunk, and would neither combine the heads that share keys nor split long sequences.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        attention: VarlenAttention,
        position_ids: torch.Tensor,
        pool_positions: torch.Tensor,
        parts: Sequence[tuple[int, Part]],
    ) -> None:
        """Lay out a step whose indices are already on the device; `of` computes them.

        Args:
            kv_cache: stores keys and values.
            attention: `flash_attention` or an equivalent function.
            position_ids: `[tokens]`, positions in the tokens' own sequences; pool_positions likewise in the pool.
            parts: the parts of the flat row in order, each with its number of tokens.
        """
        self.position_ids = position_ids
        self._kv_cache, self._attention = kv_cache, attention
        self._pool_positions = pool_positions
        self._parts = [part for _, part in parts]
        self._tokens = [tokens for tokens, _ in parts]

    @classmethod
    def of(cls, kv_cache: KVCache, attention: VarlenAttention, spans: Sequence[Span]) -> VarlenRows:
        """Lay out a step of decodes and chunks, in the order of the flat row."""
        token_positions = TokenPositions.of(spans)
        groups = [list(group) for _, group in itertools.groupby(spans, lambda span: span.count == 1)]
        indices = [_indices(group) for group in groups]
        position_ids, pool_positions, joined = upload(
            [token_positions.position_ids, token_positions.pool_positions, np.concatenate(indices)],
            kv_cache.states.device,
        )
        parts = []
        for group, on_device in zip(groups, torch.split(joined.int(), list(map(len, indices))), strict=True):
            n = len(group)
            starts, ends, first_rows = torch.split(on_device, [n + 1, n, n + 1])
            max_q, max_k = max(span.count for span in group), max(span.end for span in group)
            part = Part(starts, ends, first_rows, max_q=max_q, max_k=max_k)
            parts.append((sum(span.count for span in group), part))
        return cls(kv_cache, attention, position_ids, pool_positions, parts)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        assert rules.softcap is None, "varlen_attention has looked at every layer"
        self._kv_cache.write(layer, self._pool_positions, key, value)
        keys, values = self._kv_cache.states[layer]  # [positions, kv_heads, dim] each, in place
        rows = torch.split(query.transpose(0, 1), self._tokens)
        outs = [
            part.attend(self._attention, mine, keys, values, rules)
            for part, mine in zip(self._parts, rows, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _indices(spans: Sequence[Span]) -> np.ndarray:
    """The indices of a `Part` in one array: starts with an extra number, ends, first rows with their end."""
    starts = [*(span.slot.start for span in spans), 0]
    first_rows = np.cumsum([0, *(span.count for span in spans)])
    return np.concatenate([starts, [span.end for span in spans], first_rows]).astype(np.int64)
