"""Loading soft prompts from files, and refusing them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.contracts import ModelSpec
from server.errors import PreludeError
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt

MAX_VIRTUAL_TOKENS = 16


def load(directory: Path, spec: ModelSpec) -> list[SoftPrompt]:
    return load_soft_prompts(directory, spec, MAX_VIRTUAL_TOKENS)


def refusal(directory: Path, spec: ModelSpec) -> PreludeError:
    with pytest.raises(PreludeError) as caught:
        load(directory, spec)
    assert 400 <= caught.value.status < 500
    assert caught.value.message
    assert caught.value.remedy
    return caught.value


def tensor_with(value: float, width: int = 32) -> torch.Tensor:
    tensor = torch.zeros(5, width)
    tensor[3, 7] = value
    return tensor
