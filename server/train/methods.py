"""Methods of training: their parameters, and the prefix that these make.

A method holds parameters in float32. It implements either `virtual_tokens`, which returns input embeddings, or
`key_values`, which returns a KV prefix. `saved` is what PEFT would save.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from server.contracts import ModelSpec
from server.train.config import TrainingConfig

KeyValues = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Of each layer keys and values `[kv_heads, num_virtual_tokens, head_dim]`."""


class LearnedPrefix(nn.Module, ABC):
    """The parameters of a method."""

    peft_type = "PROMPT_TUNING"

    @abstractmethod
    def virtual_tokens(self, task: int) -> torch.Tensor | None:
        """Input embeddings `[num_virtual_tokens, hidden_size]` in float32 for rows of a task."""

    def key_values(self) -> KeyValues | None:
        """Keys and values in float32, where they are what is learned."""
        return None

    @abstractmethod
    def saved(self) -> dict[str, torch.Tensor]:
        """Tensors by the names under which PEFT keeps them, in float32 on the CPU."""


class PromptTuning(LearnedPrefix):
    """Lester et al. 2021: the virtual tokens themselves."""

    def __init__(self, initial: torch.Tensor) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(initial.clone())

    def virtual_tokens(self, task: int) -> torch.Tensor:
        return self.prompt_embeddings

    def saved(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": _kept(self.prompt_embeddings)}


class PTuning(LearnedPrefix):
    """P-tuning (Liu et al. 2021): an MLP makes the virtual tokens of embeddings of its own.

    The network's output is added to the embeddings (Razdaibiedina et al. 2023), so training starts at the given values
    and not at those of a random network. Only their sum is kept.
    """

    peft_type = "P_TUNING"

    def __init__(self, initial: torch.Tensor) -> None:
        super().__init__()
        size = initial.shape[1]
        self.embeddings = nn.Parameter(initial.clone())
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU())
        self.out = nn.Linear(size, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        # Real embeddings are small; without a norm the network would see next to nothing.
        self.norm = nn.LayerNorm(size)

    def virtual_tokens(self, task: int) -> torch.Tensor:
        made: torch.Tensor = self.out(self.mlp(self.norm(self.embeddings)))
        return self.embeddings + made

    def saved(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": _kept(self.virtual_tokens(0))}


class MultitaskPromptTuning(LearnedPrefix):
    """Wang et al. 2023: virtual tokens that tasks share, times a matrix of low rank for each of them."""

    peft_type = "MULTITASK_PROMPT_TUNING"

    def __init__(self, initial: torch.Tensor, num_tasks: int, rank: int = 1) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(initial.clone())
        # Initially every task's matrix is all ones (each rank adds 1 / rank), so all tasks start at the shared vectors.
        self.cols = nn.Parameter(torch.full((num_tasks, initial.shape[0], rank), 1.0 / rank))
        self.rows = nn.Parameter(torch.ones(num_tasks, rank, initial.shape[1]))

    def virtual_tokens(self, task: int) -> torch.Tensor:
        return self.prompt_embeddings * (self.cols[task] @ self.rows[task])

    def saved(self) -> dict[str, torch.Tensor]:
        return {
            "prompt_embeddings": _kept(self.prompt_embeddings),
            "prefix_task_cols": _kept(self.cols),
            "prefix_task_rows": _kept(self.rows),
        }


class PrefixTuning(LearnedPrefix):
    """Li and Liang 2021: keys and values of every layer, here as such and not through an MLP.

    They begin as those of real tokens: without the MLP, random ones train badly.
    """

    peft_type = "PREFIX_TUNING"

    def __init__(self, initial: KeyValues) -> None:
        super().__init__()
        # [layers, 2, kv_heads, num_virtual_tokens, head_dim]
        self.states = nn.Parameter(torch.stack([torch.stack(layer) for layer in initial]))

    def virtual_tokens(self, task: int) -> None:
        """See `LearnedPrefix`."""

    def key_values(self) -> KeyValues:
        return tuple((layer[0], layer[1]) for layer in self.states)

    def saved(self) -> dict[str, torch.Tensor]:
        """See `LearnedPrefix`; `[num_virtual_tokens, layers * 2 * kv_heads * head_dim]`."""
        return {"prompt_embeddings": _kept(join_key_values(self.key_values()))}


def join_key_values(states: KeyValues) -> torch.Tensor:
    """PEFT's flat form of a KV prefix, `[num_virtual_tokens, layers * 2 * kv_heads * head_dim]`, in float32."""
    stacked = torch.stack([torch.stack(layer) for layer in states]).float()
    return stacked.permute(3, 0, 1, 2, 4).flatten(1)


def split_key_values(tensor: torch.Tensor, spec: ModelSpec) -> KeyValues:
    """PEFT's flat form of a KV prefix, taken apart again."""
    shape = (tensor.shape[0], spec.num_hidden_layers, 2, spec.num_key_value_heads, spec.head_dim)
    states = tensor.float().view(shape).permute(1, 2, 3, 0, 4).contiguous()
    return tuple((layer[0], layer[1]) for layer in states)


def build_prefix(config: TrainingConfig, initial: torch.Tensor | KeyValues, num_tasks: int) -> LearnedPrefix:
    """The parameters of the method that is asked for, at its first values."""
    if not isinstance(initial, torch.Tensor):
        return PrefixTuning(initial)
    if config.method == "p_tuning":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return PTuning(initial)
    if config.method == "multitask_prompt_tuning":
        return MultitaskPromptTuning(initial, num_tasks)
    return PromptTuning(initial)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone().contiguous()


def clone_state(prefix: LearnedPrefix) -> dict[str, torch.Tensor]:
    """All parameters as they are now."""
    return {name: tensor.detach().cpu().clone() for name, tensor in prefix.state_dict().items()}
