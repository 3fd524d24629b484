"""The methods that soft prompts are compared with: training weights, by PEFT's LoRA or in full.

Both are trained by Prelude's own loop, on the same rows in the same order and with the same learning-rate search: for
the loop, they are a method without a prefix. Only benchmarks train weights; the server's weights are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from server.engine.model.frozen import FrozenModel
from server.train.methods import LearnedPrefix

PEAKS = {"lora": (3e-4, 1e-3, 3e-3), "full": (1e-5, 3e-5, 1e-4)}
RANK = 8


class ChangedWeights(LearnedPrefix):
    """The model's own parameters, as a method for the training loop."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def virtual_tokens(self, task: int) -> None:
        """None: there is no prefix."""

    def saved(self) -> dict[str, torch.Tensor]:
        """Empty: there are no parameters besides the model."""
        return {}


@dataclass(frozen=True)
class Tuned:
    """A model with trainable weights, and the function that turns it into an ordinary model again."""

    weights: ChangedWeights
    finish: Callable[[], None]


def lora(model: FrozenModel, seed: int) -> Tuned:
    """LoRA (Hu et al. 2022) of rank 8 on every linear layer (as in Dettmers et al. 2023), merged after training."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model.module, config)
    assert isinstance(wrapped, PeftModel)
    wrapped.eval()

    def finish() -> None:
        wrapped.merge_and_unload()
        model.module.requires_grad_(False)

    return Tuned(ChangedWeights([weight for weight in wrapped.parameters() if weight.requires_grad]), finish)


def full(model: FrozenModel, seed: int) -> Tuned:
    """Full fine-tuning of all weights."""
    model.module.requires_grad_(True)

    def finish() -> None:
        model.module.requires_grad_(False)

    return Tuned(ChangedWeights(list(model.module.parameters())), finish)


WAYS: dict[str, Callable[[FrozenModel, int], Tuned]] = {"lora": lora, "full": full}
