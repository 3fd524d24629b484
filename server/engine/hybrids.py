"""Models of which some layers have no attention: what is put in the place of those layers' own forward.

The model's own forward would run such a layer over the flat row as if it were one sequence. Ours does the layer's
matrix products over all tokens, and asks the layout for each sequence's state (`attention.RecurrentLayout`). Without a
layout the layer computes what transformers wrote, which is what the check at the start compares ours with.

To serve another family: a module like `ShortConvolution` for its layers, and their kind in `RECURRENT_LAYERS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from server.engine.attention import RecurrentLayout, StatePlace
from server.errors import UnsupportedModel

RECURRENT_LAYERS = {"lfm2": "conv", "lfm2_moe": "conv", "lfm3": "conv"}
"""By the `model_type` of a text model: how its config calls the layers that keep a recurrent state."""


class Layers(NamedTuple):
    """What a model's layers keep of a sequence."""

    num_attention_layers: int
    state_width: int
    """Numbers of all layers' recurrent states together."""


class ShortConvolution(nn.Module):
    """LFM2's gated convolution over the last few tokens; its state are the inputs of all of these but the newest.

    Attributes:
        own: transformers' module, whose weights are used.
        place: of its state, `[kernel_size - 1, hidden_size]` in one row.
    """

    def __init__(self, own: Any, first: int) -> None:
        """Take transformers' module; its state begins at the number `first`."""
        super().__init__()
        self.own = own
        self._kernel_size = own.conv.kernel_size[0]
        self.place = StatePlace(first, (self._kernel_size - 1) * own.conv.in_channels)

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
            raise UnsupportedModel("The model's convolutions use attention_mask, which the engine does not implement.")
        gate, out_gate, values = self.own.in_proj(hidden_states).chunk(3, dim=-1)
        mixed = layout.recur(self.place, (gate * values)[0], self._convolve)
        out: torch.Tensor = self.own.out_proj(out_gate * mixed)
        return out

    def _convolve(self, inputs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `attention.Recurrence`."""
        rows, tokens, width = inputs.shape
        seen = torch.cat([state.view(rows, -1, width), inputs.to(state.dtype)], dim=1)
        weights = self.own.conv.weight[:, 0].to(state.dtype)  # [width, kernel_size], the newest token's last
        out = seen[:, :tokens] * weights[:, 0]
        for age in range(1, self._kernel_size):  # each token by itself, so no neighbour changes a bit of its answer
            out = torch.addcmul(out, seen[:, age : age + tokens], weights[:, age])
        if self.own.conv.bias is not None:
            out = out + self.own.conv.bias.to(state.dtype)
        return out.to(inputs.dtype), seen[:, tokens:].reshape(rows, -1)


def kinds_with_states(text_config: PretrainedConfig) -> set[str]:
    """The kinds of layers of a model that the engine keeps a recurrent state for."""
    kind = RECURRENT_LAYERS.get(text_config.model_type)
    return set() if kind is None else {kind}


def prepare_layers(module: PreTrainedModel) -> Layers:
    """Replace the layers of a model that keep a recurrent state, if it has some; its weights stay as they are.

    Layers with attention are numbered anew, so that the KV cache has none for the others.

    Raises:
        UnsupportedModel: no layer has attention, or a convolution has no state.
    """
    config = module.config.get_text_config()
    kinds = kinds_with_states(config)
    layer_types: list[str] = getattr(config, "layer_types", None) or []
    if not kinds.intersection(layer_types):
        return Layers(config.num_hidden_layers, 0)
    attending = width = 0
    decoder: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    for layer, layer_type in zip(decoder.layers, layer_types, strict=True):
        if layer_type not in kinds:
            layer.self_attn.layer_idx = attending
            attending += 1
            continue
        if not isinstance(layer.conv, ShortConvolution):
            layer.conv = ShortConvolution(layer.conv, width)
        width += layer.conv.place.width
    if not attending or not width:
        missing = "a layer with attention" if width else "a convolution over more than one token"
        raise UnsupportedModel(f"{config.model_type} does not have {missing}.")
    return Layers(attending, width)
