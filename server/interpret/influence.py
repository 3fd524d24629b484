"""Influence: which virtual token made which output token likely, by value zeroing (Mohebbi et al. 2023).

One scoring of the answer with the soft prompt, and one for each virtual token whose values are zero in all layers; its
keys stay, so attention is the same. Attention itself is no measure: first tokens draw it whatever they mean (Xiao et
al. 2024).
"""

from collections.abc import Sequence

import torch

from server.contracts import ModelSpec
from server.engine.model.frozen import FrozenModel
from server.errors import InvalidRequest
from server.interpret.results import Influence
from server.interpret.states import prompt_states
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.methods import join_key_values


def check_model(model: ModelSpec) -> None:
    """Refuse (InvalidRequest) a model that keeps a recurrent state, which a KV prefix does not define."""
    if model.state_width:
        raise InvalidRequest(
            f"{model.name} keeps a recurrent state, in which single virtual tokens cannot be zeroed.",
            remedy="Ask for the answer without `influence`.",
            param="influence",
        )


def zeroed_prefixes(model: FrozenModel, soft_prompt: SoftPrompt) -> list[SoftPrompt]:
    """The soft prompt as a KV prefix, then one KV prefix for each virtual token without its values."""
    check_model(model.spec)
    tensor = join_key_values(prompt_states(model, soft_prompt)).cpu()
    spec = model.spec
    found = [tensor]
    for index in range(len(tensor)):
        without = tensor.clone()
        without[index].view(spec.num_kv_layers, 2, -1)[:, 1] = 0
        found.append(without)
    return [SoftPrompt("PREFIX_TUNING", one, soft_prompt.manifest) for one in found]


def influence(logprobs: Sequence[Sequence[float]], texts: Sequence[str]) -> Influence:
    """Δ log p of each output token.

    Args:
        logprobs: `[1 + virtual tokens][output tokens]`; the first row is with all of them.
        texts: of the output tokens.
    """
    values = torch.tensor(logprobs, dtype=torch.float64)
    return Influence(
        tokens=tuple(texts),
        logprobs=tuple(values[0].tolist()),
        influence=tuple(tuple(row) for row in (values[:1] - values[1:]).tolist()),
    )
