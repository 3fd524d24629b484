"""Decides at start which models the engine can serve exactly: by the config, then by a forward of two tokens.

Other models are refused with the reason; the server must never silently give wrong answers.
"""

from collections import Counter
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.engine.attention.interface import AttentionRules, PackedRows, Recurrence, StateSlice
from server.engine.model.hybrids import RecurrentLayer, kinds_with_states
from server.errors import ConfigurationError, UnsupportedModel

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raise UnsupportedModel for a model that, by its config alone, the engine cannot serve exactly."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{kind} is an encoder-decoder model; the engine serves decoder-only ones.")
    text_config = config.get_text_config()
    layers = set(getattr(text_config, "layer_types", None) or ()) - ATTENTION_LAYERS - kinds_with_states(text_config)
    if layers:
        raise UnsupportedModel(
            f"{kind} has {', '.join(sorted(layers))} layers; the engine keeps keys and values of full and sliding "
            "attention only."
        )
    if getattr(text_config, "hidden_size_per_layer_input", 0):
        raise UnsupportedModel(f"{kind} has embeddings for each layer, which need token ids; virtual tokens have none.")
    rope = getattr(text_config, "rope_parameters", None) or {}
    if "dynamic" in _rope_types(rope):
        raise UnsupportedModel(
            f"{kind} uses dynamic rotary scaling, whose frequencies depend on the longest sequence of a batch: one "
            "request would change another's answer.",
            remedy="Use a model with linear, yarn, llama3 or longrope scaling.",
        )


def _rope_types(rope_parameters: object) -> set[str]:
    if not isinstance(rope_parameters, dict):
        return set()
    own = {str(rope_parameters["rope_type"])} if "rope_type" in rope_parameters else set()
    return own.union(*(_rope_types(value) for value in rope_parameters.values()))


class _AttentionProbe:
    """A layout that records every layer's calls and attends within one row."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.calls: Counter[int] = Counter()  # layer -> number of calls
        self.shapes: dict[int, tuple[int, int]] = {}  # layer -> kv_heads, head_dim
        self.rules: dict[int, AttentionRules] = {}
        self.dtypes: set[torch.dtype] = set()
        self.state_slices: set[StateSlice] = set()
        self._row = PackedRows([2])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        if key.shape[2] != value.shape[2]:
            raise UnsupportedModel(
                f"Keys of {self._kind} have {key.shape[2]} numbers per head and values {value.shape[2]}; the engine "
                "keeps them in one tensor."
            )
        if rules.sliding_window is not None and rules.sliding_window < 1:
            raise UnsupportedModel(
                f"The sliding window of {self._kind} has {rules.sliding_window} tokens, so no token sees itself.",
                remedy="Correct sliding_window in config.json: a number of tokens, or null for none.",
            )
        self.calls[layer] += 1
        self.shapes[layer] = (key.shape[0], key.shape[2])
        self.rules[layer] = rules
        self.dtypes |= {query.dtype, key.dtype, value.dtype}
        return self._row.attend(layer, query, key, value, rules)

    def recur(self, state_slice: StateSlice, inputs: torch.Tensor, recurrence: Recurrence) -> torch.Tensor:
        self.state_slices.add(state_slice)
        return self._row.recur(state_slice, inputs, recurrence)


@torch.inference_mode()
def probe_attention(module: PreTrainedModel, layers: int) -> tuple[int, int, list[AttentionRules]]:
    """Run two tokens through a model; returns `kv_heads`, `head_dim` and the rules of its `layers` attention layers.

    Raises:
        UnsupportedModel: not every layer calls Prelude's attention function, or the layers' shapes differ.
        ConfigurationError: the output is not finite.
    """
    kind = module.config.model_type
    probe = _AttentionProbe(kind)
    try:
        embeddings = module.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long, device=module.device))
        position_ids = torch.arange(2, device=module.device).unsqueeze(0)
        output = module(inputs_embeds=embeddings, position_ids=position_ids, use_cache=False, layout=probe)
    except UnsupportedModel:
        raise
    except Exception as exc:
        raise UnsupportedModel(f"{kind} does not run with the engine's attention: {exc}.") from exc
    if not bool(torch.isfinite(output.logits).all()):
        raise ConfigurationError(
            f"The model's output is not finite in {str(module.dtype).removeprefix('torch.')}: its weights hold NaN or "
            "infinity, or exceed the range of that dtype.",
            remedy="Set PRELUDE_DTYPE=float32; if that does not help, download the model again.",
        )
    _refuse_layers_without_layout(module, probe.state_slices)
    if set(probe.shapes) != set(range(layers)):
        raise UnsupportedModel(
            f"Of the {layers} layers of {kind}, {len(probe.shapes)} hand their keys and values to transformers' "
            "AttentionInterface; all of them, once each, would have to."
        )
    if max(probe.calls.values()) > 1:
        raise UnsupportedModel(
            f"{kind} attends more than once in a layer; the engine keeps one set of keys and values."
        )
    kv_heads, head_dim = probe.shapes[0]
    if len(set(probe.shapes.values())) != 1:
        raise UnsupportedModel(f"The keys and values of {kind} differ in shape between layers.")
    if probe.dtypes != {module.dtype}:
        others = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in probe.dtypes - {module.dtype}))
        raise UnsupportedModel(f"The attention of {kind} computes in {others}, but its keys are stored as its weights.")
    layer_types = getattr(module.config.get_text_config(), "layer_types", None) or []
    for layer, layer_type in enumerate(kind for kind in layer_types if kind in ATTENTION_LAYERS):
        if layer_type == "sliding_attention" and probe.rules[layer].sliding_window is None:
            raise UnsupportedModel(f"{kind} has sliding-window layers but does not tell the attention their window.")
    return kv_heads, head_dim, [probe.rules[layer] for layer in range(layers)]


def _refuse_layers_without_layout(module: PreTrainedModel, called: set[StateSlice]) -> None:
    """Refuse a model whose recurrent layers did not call the layout, and therefore ran over the whole flat row."""
    if called != {part.state_slice for part in module.modules() if isinstance(part, RecurrentLayer)}:
        raise UnsupportedModel(
            f"In transformers {transformers.__version__}, {module.config.model_type} does not hand the forward's "
            "keywords to its layers that keep a recurrent state.",
            remedy="Update transformers (pip install --upgrade transformers), or choose another model.",
        )


def pin_longrope(module: nn.Module, max_model_len: int) -> None:
    """Fix longrope's regime for the whole server, regardless of the longest sequence in a batch.

    transformers switches all rows to the long factors as soon as one row is long, so one request could change another
    request's answer. A server whose context exceeds the model's original context always uses the long factors.
    """
    for part in module.modules():
        rope_type: Any = getattr(part, "rope_type", None)
        if rope_type == "longrope":
            _pin(part, None, max_model_len)
        elif isinstance(rope_type, dict):
            for layer_type in (name for name, kind in rope_type.items() if kind == "longrope"):
                _pin(part, layer_type, max_model_len)


def _pin(rotary: Any, layer_type: str | None, max_model_len: int) -> None:
    """Make a rotary module use the long factors for short sequences too, if the context is long."""
    parameters = rotary.config.rope_parameters
    own = parameters if layer_type is None else parameters[layer_type]
    original = own["original_max_position_embeddings"]
    if max_model_len <= original:
        return  # no position ever reaches the long regime
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    initialise = ROPE_INIT_FUNCTIONS["longrope"]
    long_inv_freq, _ = initialise(rotary.config, inv_freq.device, seq_len=original + 1, layer_type=layer_type)
    for name in ("original_inv_freq", "long_inv_freq"):
        setattr(rotary, f"{prefix}{name}", long_inv_freq.clone())
    inv_freq.copy_(long_inv_freq)
    if "long_mscale" in own:  # PhiMoE also switches the scale of cosines and sines
        own["short_mscale"] = own["long_mscale"]
