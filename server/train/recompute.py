"""Activation checkpointing: the backward pass recomputes activations that would not fit (Chen et al. 2016)."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from server.engine.model.frozen import FrozenModel
from server.engine.model.preflight import free_memory
from server.engine.out_of_memory import release_unused
from server.train.config import TrainingConfig
from server.train.data import Example

SHARE = 0.5
"""Share of the free memory that activations may take."""
KEPT_PER_NUMBER = 3
"""Estimate of the values kept for the backward pass per value that enters or leaves a matrix product: the value itself
and what norms, rotary embeddings, gates and softmax derive from it."""


def recomputes(model: FrozenModel, config: TrainingConfig, examples: Sequence[Example]) -> bool:
    """Whether a run computes activations twice; decided once, because a run's own caches change what is free."""
    if config.recompute == "auto":
        release_unused()  # of an earlier run
        return _activation_bytes(model, config, examples) > SHARE * free_memory(model.device)
    return config.recompute


@contextlib.contextmanager
def recomputing(model: FrozenModel, *, wanted: bool) -> Iterator[None]:
    """Context manager: if `wanted`, layers recompute their activations in the backward pass."""
    layers = [layer for layer in model.module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not wanted or not layers:
        yield
        return
    module: Any = model.module
    is_renamed = hasattr(module, "activation_checkpointing_enable")  # since transformers 5.23
    begin = module.activation_checkpointing_enable if is_renamed else module.gradient_checkpointing_enable
    end = module.activation_checkpointing_disable if is_renamed else module.gradient_checkpointing_disable
    begin({"use_reentrant": False})
    for layer in layers:
        layer.training = True  # only its own flag: what is in it stays as in serving, without dropout
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        end()


def _activation_bytes(model: FrozenModel, config: TrainingConfig, examples: Sequence[Example]) -> int:
    virtual = config.num_virtual_tokens
    in_each = virtual if config.method == "multitask_prompt_tuning" else 0
    lengths = [in_each + len(example.fed_ids) for example in examples]
    targets = sum(len(example.target_ids) for example in examples)
    width = sum(sum(weight.shape) for weight in model.module.parameters() if weight.dim() == 2)
    heads: int = model.module.config.get_text_config().num_attention_heads
    scores = len(lengths) * max(lengths) * (virtual + max(lengths)) * heads * model.spec.num_hidden_layers
    logits = targets * model.spec.vocab_size * 4
    return KEPT_PER_NUMBER * (((virtual + sum(lengths)) * width + scores) * model.dtype.itemsize + logits)
