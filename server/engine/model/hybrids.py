"""Models with recurrent layers, and the modules that replace those layers' forward.

The model's own forward would run such a layer over the flat row as if it were one sequence. The replacement computes
the layer's matrix products over all tokens, and gets each sequence's state from the layout
(`interface.RecurrentLayout`). Without a layout it calls transformers' forward, with which the check at start compares
it.

Another family needs a module like `ShortConvolution` for its layers, and an entry in `RECURRENT_LAYERS`.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from server.engine.attention.interface import RecurrentLayout, StateSlice
from server.errors import UnsupportedModel


class Layers(NamedTuple):
    """The data that a model's layers store for a sequence."""

    num_attention_layers: int
    state_width: int  # number of values in the recurrent states of all layers together


class RecurrentLayer(nn.Module):
    """The replacement of a layer that keeps a recurrent state."""

    state_slice: StateSlice
    """Position of the layer's state."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own
        """transformers' module, which provides the weights."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layout: RecurrentLayout | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """`[1, tokens, hidden_size]` to the same shape.

        Raises:
            UnsupportedModel: the model masks tokens beside the layout.
        """
        if layout is None:
            found: torch.Tensor = self.own(hidden_states, attention_mask=attention_mask, **others)
            return found
        if attention_mask is not None:
            raise UnsupportedModel(
                "The model's recurrent layers use attention_mask, which the engine does not support."
            )
        return self.run(hidden_states, layout)

    def run(self, hidden_states: torch.Tensor, layout: RecurrentLayout) -> torch.Tensor:
        """`[1, tokens, hidden_size]` to the same shape; the layout provides each sequence's state."""
        raise NotImplementedError


class ShortConvolution(RecurrentLayer):
    """LFM2's gated convolution over the last few tokens; its state is the inputs of all but the newest of them."""

    def __init__(self, own: Any, first: int) -> None:
        """Take transformers' module; its state begins at the number `first`."""
        super().__init__(own)
        self.state_slice = StateSlice(first, (own.conv.kernel_size[0] - 1) * own.conv.in_channels)

    def run(self, hidden_states: torch.Tensor, layout: RecurrentLayout) -> torch.Tensor:
        gate, out_gate, values = self.own.in_proj(hidden_states).chunk(3, dim=-1)
        mixed = layout.recur(self.state_slice, (gate * values)[0], self._convolve)
        out: torch.Tensor = self.own.out_proj(out_gate * mixed)
        return out

    def _convolve(self, inputs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, after = convolve(self.own.conv, inputs, state)
        return out.to(inputs.dtype), after


class GatedDeltaNet(RecurrentLayer):
    """The linear attention of Qwen3-Next and Qwen3.5 (gated delta rule).

    Its state consists of the last inputs of a convolution, as in `ShortConvolution`, and for each head of a matrix
    `[key_dim, value_dim]`, which the gated delta rule decays and corrects with each token.
    """

    def __init__(self, own: Any, first: int) -> None:
        """Take transformers' module; its state begins at the number `first`."""
        super().__init__(own)
        rules = sys.modules[type(own).__module__]  # not `own`'s functions, which may be installed kernels on a GPU
        self._rule_of_chunks: Any = rules.torch_chunk_gated_delta_rule
        self._rule_of_one: Any = rules.torch_recurrent_gated_delta_rule
        self._conv_width = (own.conv1d.kernel_size[0] - 1) * own.conv_dim
        self._matrices = own.num_v_heads, own.head_k_dim, own.head_v_dim
        self.state_slice = StateSlice(first, self._conv_width + own.num_v_heads * own.head_k_dim * own.head_v_dim)

    def run(self, hidden_states: torch.Tensor, layout: RecurrentLayout) -> torch.Tensor:
        own = self.own
        if hasattr(own, "in_proj_qkvz"):  # Qwen3-Next
            parts = own.fix_query_key_value_ordering(own.in_proj_qkvz(hidden_states), own.in_proj_ba(hidden_states))
            query, key, value, gate, beta, decay = (part.flatten(2) for part in parts)
            inputs = [query, key, value, beta, decay]
        else:
            gate = own.in_proj_z(hidden_states)
            inputs = [projection(hidden_states) for projection in (own.in_proj_qkv, own.in_proj_b, own.in_proj_a)]
        mixed = layout.recur(self.state_slice, torch.cat(inputs, dim=-1)[0], self._recur)
        heads = mixed.reshape(-1, own.head_v_dim)
        out: torch.Tensor = own.out_proj(own.norm(heads, gate.reshape(heads.shape)).view_as(gate))
        return out

    def _recur(self, inputs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.own
        last, matrices = torch.tensor_split(state, [self._conv_width], dim=-1)
        values, beta, decay = torch.split(inputs, [own.conv_dim, own.num_v_heads, own.num_v_heads], dim=-1)
        mixed, last = convolve(own.conv1d, values, last)
        mixed = ACT2FN[own.activation](mixed).to(inputs.dtype)
        parts = torch.split(mixed, [own.key_dim, own.key_dim, own.value_dim], dim=-1)
        query, key = (part.reshape(*inputs.shape[:2], own.num_k_heads, own.head_k_dim) for part in parts[:2])
        value = parts[2].reshape(*inputs.shape[:2], own.num_v_heads, own.head_v_dim)
        shared_by = own.num_v_heads // own.num_k_heads
        rule = self._rule_of_one if inputs.shape[1] == 1 else self._rule_of_chunks
        out, matrices = rule(
            query.repeat_interleave(shared_by, dim=2),
            key.repeat_interleave(shared_by, dim=2),
            value,
            g=-own.A_log.float().exp() * F.softplus(decay.float() + own.dt_bias),
            beta=beta.sigmoid(),
            initial_state=matrices.reshape(-1, *self._matrices),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return out.flatten(2), torch.cat([last, matrices.flatten(1).to(state.dtype)], dim=-1)


def convolve(conv: Any, inputs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal convolution of each channel by itself, in the dtype of its state; returns outputs and the next state.

    Args:
        conv: the module with the weights.
        inputs: `[rows, tokens, width]`, as the outputs.
        state: `[rows, (kernel_size - 1) * width]`, the inputs before these.
    """
    rows, tokens, width = inputs.shape
    seen = torch.cat([state.reshape(rows, -1, width), inputs.to(state.dtype)], dim=1)
    weights = conv.weight[:, 0].to(state.dtype)  # [width, kernel_size], the newest token's last
    out = seen[:, :tokens] * weights[:, 0]
    for age in range(1, conv.kernel_size[0]):  # each token by itself, so other tokens cannot change a bit of its result
        out = torch.addcmul(out, seen[:, age : age + tokens], weights[:, age])
    if conv.bias is not None:
        out = out + conv.bias.to(state.dtype)
    return out, seen[:, tokens:].reshape(rows, -1)


class Kind(NamedTuple):
    """A kind of layer that keeps a recurrent state."""

    layer_type: str  # its name in the config
    attribute: str  # of a decoder layer that contains the module
    ours: Callable[[Any, int], RecurrentLayer]


_CONVOLUTION = Kind("conv", "conv", ShortConvolution)
_DELTA = Kind("linear_attention", "linear_attn", GatedDeltaNet)

RECURRENT_LAYERS = dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _CONVOLUTION) | dict.fromkeys(
    ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _DELTA
)
"""The kind of recurrent layer by the text model's `model_type`."""


def kinds_with_states(text_config: PretrainedConfig) -> set[str]:
    """The layer types of a model for which the engine stores a recurrent state."""
    kind = RECURRENT_LAYERS.get(text_config.model_type)
    return set() if kind is None else {kind.layer_type}


def prepare_layers(module: PreTrainedModel) -> Layers:
    """Replace a model's recurrent layers, if it has any; the weights do not change.

    Layers with attention are renumbered, so that the KV cache has no space for recurrent layers. Raises
    UnsupportedModel if no layer has attention, or a convolution has no state.
    """
    config = module.config.get_text_config()
    kind = RECURRENT_LAYERS.get(config.model_type)
    layer_types: list[str] = getattr(config, "layer_types", None) or []
    if kind is None or kind.layer_type not in layer_types:
        return Layers(config.num_hidden_layers, 0)
    attending = width = 0
    decoder: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    for layer, layer_type in zip(decoder.layers, layer_types, strict=True):
        if layer_type != kind.layer_type:
            layer.self_attn.layer_idx = attending
            attending += 1
            continue
        recurrent = getattr(layer, kind.attribute)
        if not isinstance(recurrent, RecurrentLayer):
            recurrent = kind.ours(recurrent, width)
            setattr(layer, kind.attribute, recurrent)
        width += recurrent.state_slice.width
    if not attending or not width:
        missing = "a layer with attention" if width else "a convolution over more than one token"
        raise UnsupportedModel(f"{config.model_type} does not have {missing}.")
    return Layers(attending, width)
