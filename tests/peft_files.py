"""PEFT directories for tests: written by PEFT itself, and then damaged by hand in the ways that must be refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.support import tiny_module

KINDS = ("PROMPT_TUNING", "P_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE", "MULTITASK_PROMPT_TUNING")
NUM_TASKS = 3

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MANIFEST = "manifest.json"


@cache
def peft_base(architecture: str = "llama") -> PreTrainedModel:
    """The tiny model that adapters are made for. PEFT does not write to it: prompt learning adds an encoder outside."""
    return tiny_module(architecture, dtype=torch.float32, attention="eager")


def peft_config(kind: str, num_virtual_tokens: int = 5) -> peft.PeftConfig:
    """PEFT's config of a kind."""
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens}
    match kind:
        case "PROMPT_TUNING":
            return peft.PromptTuningConfig(**common)
        case "P_TUNING":
            return peft.PromptEncoderConfig(**common, encoder_hidden_size=16)
        case "CPT":
            return peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=list(range(num_virtual_tokens)))
        case "PREFIX_TUNING":
            return peft.PrefixTuningConfig(**common)
        case "CARTRIDGE":
            return peft.CartridgeConfig(**common)
        case "MULTITASK_PROMPT_TUNING":
            return peft.MultitaskPromptTuningConfig(**common, num_tasks=NUM_TASKS, num_ranks=2)
        case _:
            raise ValueError(kind)


def peft_model(kind: str, architecture: str = "llama", num_virtual_tokens: int = 5, seed: int = 0) -> peft.PeftModel:
    """A tiny model with a random soft prompt of a kind."""
    model = peft.get_peft_model(peft_base(architecture), peft_config(kind, num_virtual_tokens))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def peft_directory(
    path: Path, kind: str = "PROMPT_TUNING", architecture: str = "llama", num_virtual_tokens: int = 5, seed: int = 0
) -> Path:
    """Save a random soft prompt with PEFT; answers its directory."""
    peft_model(kind, architecture, num_virtual_tokens, seed).save_pretrained(str(path))
    return path


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Change or remove keys of a JSON file, which is made if it does not exist."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value = {key: item for key, item in value.items() if key not in remove} | changes
    path.write_text(json.dumps(value))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Change, add or (None) remove tensors of a PEFT directory."""
    tensors = {**load_file(directory / TENSORS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / TENSORS)


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    """Write a safetensors file whose header says what it likes."""
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
