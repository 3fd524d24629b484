"""Keys and values of a soft prompt of either kind, as the model's attention layers see them."""

from collections.abc import Iterable

import torch

from server.engine.attention.interface import PackedRows
from server.engine.model.frozen import FrozenModel
from server.errors import InvalidRequest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.methods import KeyValues

LARGEST = 1e12
"""Numbers of larger size have lengths and products that float32 cannot hold, so tests on them would be meaningless."""


@torch.no_grad()
def prompt_states(model: FrozenModel, soft_prompt: SoftPrompt, tensor: torch.Tensor | None = None) -> KeyValues:
    """Keys and values per attention layer, `[kv_heads, num_virtual_tokens, head_dim]` in float32 or float64.

    Args:
        tensor: another tensor of its shape, such as its start; by default its own.
    """
    tensor = soft_prompt.tensor if tensor is None else tensor
    if soft_prompt.is_kv_prefix:
        spec = model.spec
        shape = (tensor.shape[0], spec.num_kv_layers, 2, spec.num_key_value_heads, spec.head_dim)
        states = tensor.to(model.device).float().view(shape).permute(1, 2, 3, 0, 4)
        return tuple((layer[0], layer[1]) for layer in states)
    collected: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    count = tensor.shape[0]
    positions = torch.arange(count, device=model.device)
    embedded = tensor.to(model.device, model.dtype)
    model.forward(embedded, positions, PackedRows([count], collected=collected), positions[-1:])
    return tuple((_wide(key), _wide(value)) for _, (key, value) in sorted(collected.items()))


def check_numbers(tensors: Iterable[torch.Tensor]) -> None:
    """Refuse (InvalidRequest) numbers that measures cannot compute with; trained ones are smaller by far."""
    if not all(bool((tensor.abs() <= LARGEST).all()) for tensor in tensors):
        raise InvalidRequest(
            f"The soft prompt cannot be interpreted: its numbers, or the keys and values that the model makes of them, "
            f"exceed {LARGEST:g} or are not finite.",
            remedy="Train it again with a lower learning rate. Trained virtual tokens have lengths below a thousand.",
        )


def mean_values(states: KeyValues) -> torch.Tensor:
    """The mean value over the virtual tokens, `[layers, kv_heads * head_dim]`."""
    return torch.stack([value.mean(1).flatten() for _, value in states])


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states if states.dtype == torch.float64 else states.float()
