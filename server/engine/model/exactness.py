"""Compares the engine's logits with those of the model's own forward at start; a model that differs is refused.

A config does not show everything: a model may ignore positions, look ahead, or need token ids beside embeddings.
Therefore a few tokens are computed both ways when the model is loaded.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from transformers import PreTrainedModel

from server.contracts import ModelSpec
from server.engine.attention.cached_rows import CachedRows, Span
from server.engine.attention.interface import ATTENTION_NAME, AttentionRules, Layout, Recurrence, StateSlice
from server.engine.attention.recurrent import RecurrentRows
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.slots import Slot
from server.engine.model.preflight import quantisation
from server.errors import UnsupportedModel

NUM_TOKENS = 8
"""Number of tokens in each row; more would take a large model on a CPU seconds."""

NARROW_WINDOW = 3

LARGEST_ERROR = 1e-3
"""Largest error relative to the largest logit, in float32 and float64. A correct model's error is below 1e-5."""
LARGEST_ERROR_HALF = 0.1
"""The same for bfloat16, float16 and quantised weights, where rounding errors are a few percent."""

REMEDY = "Choose a model that docs/models.md lists as right."


class ModelInEngine(Protocol):
    """The part of `FrozenModel` that the comparison needs."""

    spec: ModelSpec
    module: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings `[tokens, hidden_size]`."""

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[kept, vocab_size]` of the flat-row indices in `keep`."""


@torch.inference_mode()
def refuse_inexact(model: ModelInEngine) -> None:
    """Compare the engine's logits with those of the model's own forward over token ids.

    For the comparison, sliding windows are made so narrow that they hide some of the few tokens. Raises
    UnsupportedModel, which names the cause, if the logits differ.
    """
    config = model.module.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    has_window = isinstance(window, int) and window < model.spec.max_model_len
    # From the middle of the vocabulary, because special tokens are often at its ends.
    ids = torch.linspace(0, model.spec.vocab_size - 1, NUM_TOKENS + 2, device=model.device)[1:-1].long()
    exact = model.dtype in (torch.float32, torch.float64) and quantisation(model.module.config) is None
    largest = LARGEST_ERROR if exact else LARGEST_ERROR_HALF
    if has_window:
        config.sliding_window = NARROW_WINDOW
    try:
        own = own_logits(model.module, input_ids=ids)
        error = _typical_error(_engine_logits(model, ids, narrow=has_window), torch.cat([own, own]))
    finally:
        if has_window:
            config.sliding_window = window
    if error <= largest:
        return
    kind, remedy = model.module.config.model_type, REMEDY
    own = own_logits(model.module, input_ids=ids)
    half = len(ids) // 2
    if not _typical_error(own_logits(model.module, input_ids=ids[:half]), own[:half]) <= largest:
        cause = "lets tokens see those after them, so it does not generate from left to right"
    elif not _typical_error(own_logits(model.module, inputs_embeds=model.embed(ids)), own) <= largest:
        cause = "needs token ids beside embeddings, and virtual tokens have none"
    elif has_window and _typical_error(_engine_logits(model, ids, narrow=False), torch.cat([own, own])) <= largest:
        cause = f"has a sliding window of {window:,} tokens that it does not hand to the attention"
        remedy = f"Set PRELUDE_MAX_MODEL_LEN to at most {window}."
    else:
        cause = (
            "computes more than causal attention from a token's neighbours, or ignores the positions that it is given "
            "or the rows whose logits are wanted"
        )
    raise UnsupportedModel(
        f"{kind} {cause}: its logits through the engine differ from its own by {error:.0%} of the largest.",
        remedy=remedy,
    )


def _engine_logits(model: ModelInEngine, ids: torch.Tensor, *, narrow: bool) -> torch.Tensor:
    """The engine's logits `[2 * tokens, vocab_size]` of two sequences with the same tokens, one after the other.

    They are computed in two steps: the beginning of each sequence, then the next chunk of one beside the last token of
    the other. In each step the tokens of both sequences are shuffled, because outside attention nothing in a model may
    depend on a token's neighbours or on its position in the flat row. Raises UnsupportedModel if the model writes to
    its input embeddings.
    """
    tokens = len(ids)
    kv_cache = KVCache(replace(model.spec, max_model_len=tokens), num_slabs=2)
    first, second = (kv_cache.allocate(tokens) for _ in range(2))
    assert first is not None and second is not None, "a slab each"  # noqa: PT018
    steps = (
        (Span(first, 0, tokens - 3), Span(second, 0, tokens - 1)),
        (Span(second, tokens - 1, 1), Span(first, tokens - 3, 3)),
    )
    rows: dict[tuple[Slot, int], torch.Tensor] = {}
    for spans in steps:
        embeddings = model.embed(torch.cat([ids[span.start : span.end] for span in spans]))
        layout = _Shuffled(kv_cache, spans, len(embeddings), narrow=narrow)
        shuffled = embeddings[layout.order]
        with kv_cache.step():
            logits = model.forward(shuffled, layout.position_ids, layout, layout.back).float()
        if not torch.equal(shuffled[layout.back], embeddings):
            raise UnsupportedModel(
                f"{model.module.config.model_type} writes to the embeddings that it is given, which may be a soft "
                "prompt's.",
                remedy=REMEDY,
            )
        for span, part in zip(spans, torch.split(logits, [span.count for span in spans]), strict=True):
            rows[span.slot, span.start] = part
    return torch.cat([rows[key] for key in sorted(rows)])


class _Shuffled:
    """The layout of a step whose tokens are shuffled in the flat row; see `interface.Layout`."""

    def __init__(self, kv_cache: KVCache, spans: Sequence[Span], tokens: int, *, narrow: bool) -> None:
        """Shuffle a step's tokens: `order` is their order in the flat row, `back` the inverse permutation.

        With `narrow`, sliding windows are replaced by `NARROW_WINDOW`.
        """
        rows = CachedRows(kv_cache, spans)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
        self.order = order.to(rows.position_ids.device)
        self.back = self.order.argsort()
        self.position_ids = rows.position_ids[self.order]
        self._rows, self._narrow = rows, narrow
        self._recurrent = None if kv_cache.recurrent is None else RecurrentRows(rows, kv_cache.recurrent, spans)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        if self._narrow and rules.sliding_window is not None:
            rules = replace(rules, sliding_window=NARROW_WINDOW)
        query, key, value = (states[:, self.back] for states in (query, key, value))
        return self._rows.attend(layer, query, key, value, rules)[self.order]

    def recur(self, state_slice: StateSlice, inputs: torch.Tensor, recurrence: Recurrence) -> torch.Tensor:
        assert self._recurrent is not None, "only models with a recurrent state ask for it"
        return self._recurrent.recur(state_slice, inputs[self.back], recurrence)[self.order]


def own_logits(module: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, vocab_size]` of the model's own forward over `input_ids` or `inputs_embeds` of one row."""
    batch = {name: tensor[None] for name, tensor in inputs.items()}
    module.set_attn_implementation("eager")
    try:
        logits: torch.Tensor = module(**batch, use_cache=False).logits[0].float()
    finally:
        module.set_attn_implementation(ATTENTION_NAME)
    return logits


def errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """For each token, the largest difference of its logits relative to the largest logit."""
    return (got - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1)


def _typical_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The upper quartile of the tokens' errors; NaN if any error is not finite.

    The largest error would be too strict: in a mixture of experts, rounding may send a single token to another expert.
    """
    of_tokens = errors(got, expected)
    return float(of_tokens.quantile(0.75)) if bool(of_tokens.isfinite().all()) else float("nan")
