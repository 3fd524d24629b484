"""Tiny models with layers that keep a recurrent state."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.attention.interface import ATTENTION_NAME, register_attention
from server.engine.model.frozen import FrozenModel
from tests.support import (
    HYBRIDS,
    byte_tokenizer,
    skip_unless_served,
)


def hybrid(**fields: Any) -> FrozenModel:
    skip_unless_served("lfm2")
    register_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model("lfm2", **(HYBRIDS["lfm2"] | fields))
    module = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return FrozenModel(module.eval(), byte_tokenizer(), name="hybrid", max_model_len=128)
