"""Reads and writes PEFT directories: `adapter_config.json` + `adapter_model.safetensors` [+ `manifest.json`].

All checks use the config and the safetensors header, before any tensor is allocated; pickles are never read.
`load_soft_prompts` returns a list, because a multitask directory contains one soft prompt for each task.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from server.contracts import ModelSpec
from server.errors import InvalidSoftPrompt
from server.soft_prompts.declared import (
    CONFIG_FILE,
    MULTITASK,
    check_declared,
    check_multitask,
    check_tensor_names,
    notes_of,
    peft_type_of,
)
from server.soft_prompts.limits import check_manifest
from server.soft_prompts.manifest import Manifest, parse_json_object
from server.soft_prompts.soft_prompt import SoftPrompt, check_base_model, check_finite, check_shape
from server.soft_prompts.tensor_file import TensorFile, open_regular, open_tensor_file

TENSOR_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"

MAX_JSON_BYTES = 2**20
MAX_MULTITASK_BYTES = 2**28
"""Maximum size of all tensors of a multitask soft prompt; its files store them in a small low-rank form."""
PICKLE_FILES = ("adapter_model.bin", "decoder.pt", "encoder.pt", "adapter_model.pt", "adapter_model.pth")


def load_soft_prompts(directory: Path, model: ModelSpec, max_virtual_tokens: int) -> list[SoftPrompt]:
    """Load and validate the soft prompts of a PEFT directory: one, or one per task of a multitask soft prompt.

    Raises:
        InvalidSoftPrompt: a file is missing or malformed, or the tensor does not fit the model.
        UnsupportedPeftType: the adapter is not a soft prompt.
        BaseModelMismatch: the manifest names another frozen model.
    """
    config = parse_json_object(_read_small(directory / CONFIG_FILE), CONFIG_FILE)
    manifest_path = directory / MANIFEST_FILE
    # A dangling link is an error, not a missing manifest: without its template, the task would give other answers.
    manifest = Manifest.parse(_read_small(manifest_path)) if os.path.lexists(manifest_path) else Manifest()
    peft_type = peft_type_of(config)
    check_base_model(manifest, model)
    with _open_tensors(directory / TENSOR_FILE) as tensors:
        check_tensor_names(peft_type, tensors.entries, TENSOR_FILE)
        if peft_type == MULTITASK:
            values = _multitask_rows(tensors, config, model, max_virtual_tokens)
        else:
            values = [_single_tensor(tensors, peft_type, config, model, max_virtual_tokens)]
    multitask = peft_type == MULTITASK
    for value in values:
        check_finite(value, model.dtype)
    kind = "PROMPT_TUNING" if multitask else peft_type
    check_manifest(manifest, len(values))
    notes = notes_of(config, manifest, model)
    return [SoftPrompt(kind, value, manifest, is_multitask_row=multitask, notes=notes) for value in values]


def save_soft_prompt(directory: Path, soft_prompt: SoftPrompt, model: ModelSpec) -> None:
    """Write a PEFT directory that `PeftModel.from_pretrained` loads, with Prelude's manifest."""
    tensors = {"prompt_embeddings": soft_prompt.tensor}
    _write(directory, peft_config(soft_prompt, model), soft_prompt.manifest, tensors)


def save_multitask(directory: Path, tensors: dict[str, torch.Tensor], manifest: Manifest, model: ModelSpec) -> None:
    """Write the PEFT directory of a multitask soft prompt, from the shared embeddings and each task's factors."""
    shared = SoftPrompt("PROMPT_TUNING", tensors["prompt_embeddings"], manifest)
    tasks, _, rank = tensors["prefix_task_cols"].shape
    config = peft_config(shared, model) | {
        "num_ranks": rank,
        "num_tasks": tasks,
        "peft_type": MULTITASK,
        "prompt_tuning_init": "RANDOM",  # PEFT requires this key but does not use it when loading
    }
    _write(directory, config, manifest, tensors)


def _write(directory: Path, config: dict[str, Any], manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, directory / TENSOR_FILE, {"format": "pt"})
    (directory / TENSOR_FILE).chmod(0o644)  # safetensors makes the file readable only to its owner


def peft_config(soft_prompt: SoftPrompt, model: ModelSpec) -> dict[str, Any]:
    """The keys of `adapter_config.json` that PEFT needs to rebuild the soft prompt."""
    kv = soft_prompt.is_kv_prefix
    config: dict[str, Any] = {
        "base_model_name_or_path": model.name,
        # PEFT takes the length of a CPT soft prompt from its initial ids; it needs nothing else of them when loading.
        "cpt_token_ids": [0] * soft_prompt.num_virtual_tokens if soft_prompt.peft_type == "CPT" else None,
        "inference_mode": True,
        "num_attention_heads": model.num_key_value_heads if kv else None,
        "num_layers": model.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": soft_prompt.num_virtual_tokens,
        "peft_type": soft_prompt.peft_type,
        "task_type": "CAUSAL_LM",
        "token_dim": model.num_key_value_heads * model.head_dim if kv else model.hidden_size,
    }
    return {key: value for key, value in config.items() if value is not None}


def _read_small(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as exc:
        raise InvalidSoftPrompt(f"{path.name} is missing.") from exc
    if len(data) > MAX_JSON_BYTES:
        raise InvalidSoftPrompt(f"{path.name} is larger than {MAX_JSON_BYTES} bytes.")
    return data


@contextmanager
def _open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open the tensor file; if it is missing, the error names a pickle that was found instead."""
    if not path.exists():
        pickles = [name for name in PICKLE_FILES if (path.parent / name).exists()]
        if pickles:
            raise InvalidSoftPrompt(
                f"{pickles[0]} is a pickle, which can run code when it is opened: it is never read.",
                remedy="Convert it: load it with PEFT and call save_pretrained(..., safe_serialization=True).",
            )
        raise InvalidSoftPrompt(f"{TENSOR_FILE} is missing.")
    with open_tensor_file(path) as tensors:
        yield tensors


def _single_tensor(
    tensors: TensorFile, peft_type: str, config: dict[str, Any], model: ModelSpec, max_virtual_tokens: int
) -> torch.Tensor:
    shape = tensors.shape("prompt_embeddings")
    check_shape(peft_type, shape, model, max_virtual_tokens)
    check_declared(config, peft_type, shape[0], model)
    return tensors.read("prompt_embeddings")


def _multitask_rows(
    tensors: TensorFile, config: dict[str, Any], model: ModelSpec, max_virtual_tokens: int
) -> list[torch.Tensor]:
    """The tensors of multitask prompt tuning (Wang et al. 2023): shared embeddings times low-rank matrices.

    Shapes: prompt_embeddings `[n, d]`, prefix_task_cols `[tasks, n, r]`, prefix_task_rows `[tasks, r, d]`.
    """
    shape = tensors.shape("prompt_embeddings")
    cols, rows = tensors.shape("prefix_task_cols"), tensors.shape("prefix_task_rows")
    check_shape(MULTITASK, shape, model, max_virtual_tokens)
    fits = len(cols) == len(rows) == 3 and cols == (rows[0], shape[0], rows[1]) and rows[2] == shape[1]
    if not fits or not 1 <= cols[0] <= 1000 or not 1 <= cols[2] <= shape[1]:
        raise InvalidSoftPrompt(
            f"prefix_task_cols {list(cols)} and prefix_task_rows {list(rows)} do not fit prompt_embeddings "
            f"{list(shape)}: expected [tasks, n, r] and [tasks, r, d]."
        )
    # Size of the product or of the larger factor: the rank may exceed n, although this is useless.
    if cols[0] * max(shape[0], cols[2]) * shape[1] * 4 > MAX_MULTITASK_BYTES:
        raise InvalidSoftPrompt(
            f"{cols[0]} tasks of {shape[0]} virtual tokens take more than {MAX_MULTITASK_BYTES} bytes when unpacked.",
            remedy="Publish fewer tasks at a time.",
        )
    check_declared(config, MULTITASK, shape[0], model)
    check_multitask(config, cols[0], cols[2])
    shared = tensors.read("prompt_embeddings").float()
    task_cols = tensors.read("prefix_task_cols").float()
    task_rows = tensors.read("prefix_task_rows").float()
    return [shared * (task_cols[task] @ task_rows[task]) for task in range(cols[0])]
