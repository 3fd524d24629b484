"""Soft prompts whose interpretation is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.forward import key_values_of
from server.train.methods import join_key_values


def begun_at(tokens: Sequence[int], labels: Sequence[str] | None = None) -> Manifest:
    """A manifest that declares its start."""
    fields = {"training": {"start": {"initial_token_ids": list(tokens)}}, "labels": labels}
    return Manifest.model_validate(fields)


def embeddings(model: FrozenModel, tokens: Sequence[int]) -> torch.Tensor:
    return model.embed(torch.tensor(tokens)).float()


def planted(model: FrozenModel, tokens: Sequence[int], start: Sequence[int]) -> SoftPrompt:
    """A soft prompt that became real tokens, but began as others."""
    return SoftPrompt("PROMPT_TUNING", embeddings(model, tokens), begun_at(start))


def untrained(model: FrozenModel, start: Sequence[int], seed: int, size: float = 1.0) -> SoftPrompt:
    """A soft prompt that moved from its start in random directions."""
    generator = torch.Generator().manual_seed(seed)
    first = embeddings(model, start)
    return SoftPrompt("PROMPT_TUNING", first + size * torch.randn(first.shape, generator=generator), begun_at(start))


def token_states(model: FrozenModel, tokens: Sequence[int]) -> torch.Tensor:
    """Keys and values of tokens as a KV prefix, `[tokens, kv_width]`."""
    return join_key_values(key_values_of(model, tokens))


def distance_from_uniform(p: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's distance of p-values from the uniform distribution, times √n; above 1.63 in 1 %."""
    ordered, count = p.sort().values, len(p)
    steps = torch.arange(count + 1, dtype=p.dtype) / count
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()) * math.sqrt(count)
